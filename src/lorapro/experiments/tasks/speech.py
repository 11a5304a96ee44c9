"""Speech to text with Whisper: an encoder-decoder whose encoder hears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.assets import asset_path
from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import Examples, load_pretrained
from lorapro.experiments.tasks.causal import IGNORED
from lorapro.experiments.tasks.seq2seq import Seq2Seq

if TYPE_CHECKING:
    from numpy import ndarray
    from transformers import PreTrainedModel

__all__ = ["Speech", "SpeechOptions"]


@dataclass
class SpeechOptions:
    """Keys of speech to text."""

    audio_column: str = option("audio", "column of a WAV file's path, relative to the data folder")
    answer_column: str = option("text", "column of what is to be written")
    seconds: int = option(
        4, "length that every recording is padded to; longer ones are left out", least=1
    )
    max_target_length: int = option(
        24, "longest answer in tokens; longer ones are left out", least=4
    )


class Speech(Seq2Seq):
    """Train Whisper to write what is asked for what it hears.

    The encoder reads ``seconds`` instead of thirty: its first positions are kept, which are
    sinusoids. ``accuracy`` counts answers whose every token is the most probable one.
    """

    options: ClassVar[type] = SpeechOptions
    peft_task_type: ClassVar[str | None] = None  # PEFT's wrapper for text would ask for input_ids

    def columns_used(self) -> tuple[str, ...]:
        """Audio and answer."""
        return self.args.audio_column, self.args.answer_column

    def load_processor(self) -> Any:
        """Load tokenizer and feature extractor, the latter for recordings of ``seconds``."""
        from transformers import WhisperFeatureExtractor, WhisperProcessor

        try:
            processor = WhisperProcessor.from_pretrained(self.model_path)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"model {self.model_name!r} has no processor of Whisper; take one such as "
                "whisper-tiny-en"
            ) from error
        processor.feature_extractor = WhisperFeatureExtractor.from_pretrained(
            self.model_path, chunk_length=self.args.seconds
        )
        return processor

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def encode(self, rows: list[Row]) -> Examples:
        """Make spectrograms; labels run from the token that turns time stamps off to the end."""
        extractor = self.processor.feature_extractor
        folder = Path(asset_path(self.data_name)).expanduser()
        start = self.tokenizer.convert_tokens_to_ids("<|notimestamps|>")
        examples = []
        for row in rows:
            sound = _read(folder / str(row[self.args.audio_column]), extractor.sampling_rate)
            answer = f" {row[self.args.answer_column]}"
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            labels = [start, *ids, self.tokenizer.eos_token_id]
            fits = len(sound) <= extractor.n_samples and len(labels) <= self.args.max_target_length
            if fits:
                heard = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="np")
                features = heard["input_features"][0].astype("float16")
                examples.append({"input_features": features, "labels": labels})
        return examples

    def load_model(self) -> PreTrainedModel:
        """Load Whisper with an encoder of ``seconds``."""
        import torch
        from transformers import WhisperForConditionalGeneration

        model: Any = load_pretrained(
            WhisperForConditionalGeneration, self.model_path, self.model_name, dtype=self.run.dtype
        )
        encoder = model.model.encoder
        extractor = self.processor.feature_extractor
        stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]
        count = extractor.nb_max_frames // stride
        if count > model.config.max_source_positions:
            raise UserError(
                f"seconds is {self.args.seconds}, more than model {self.model_name!r} hears: "
                f"{model.config.max_source_positions * stride * extractor.hop_length}"
                f" samples of {extractor.sampling_rate} a second"
            )
        kept = encoder.embed_positions.weight.data[:count].clone()
        encoder.embed_positions = torch.nn.Embedding.from_pretrained(kept, freeze=True)
        encoder.max_source_positions = model.config.max_source_positions = count
        model.config.use_cache = False
        return model

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Stack the spectrograms; pad labels with -100."""
        return SpeechCollator(self.run.dtype)


@dataclass(frozen=True)
class SpeechCollator:
    """Turn examples into a batch."""

    dtype: str = "float32"

    def __call__(self, examples: Examples) -> dict[str, Any]:
        """Return ``input_features`` (batch, mels, frames) and ``labels`` (batch, longest)."""
        import numpy as np
        import torch

        heard = torch.from_numpy(np.stack([e["input_features"] for e in examples]))
        labels = [torch.tensor(e["labels"]) for e in examples]
        return {
            "input_features": heard.to(getattr(torch, self.dtype)),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, True, IGNORED),
        }


def _read(path: Path, rate: int) -> ndarray:
    """Return the samples of a WAV file between -1 and 1."""
    import numpy as np
    from scipy.io import wavfile

    try:
        found, samples = wavfile.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if found != rate or samples.ndim != 1 or samples.dtype != np.int16:
        raise UserError(
            f"{path} has {found} samples a second of type {samples.dtype} in {samples.ndim} "
            f"dimension(s); expected one channel of 16-bit samples, {rate} a second"
        )
    return samples.astype(np.float32) / 32768
