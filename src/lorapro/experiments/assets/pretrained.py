"""A model made here: a Llama of 1.1 million parameters, pretrained on news.

A model so small learns another text in a minute on one core, so that optimizers can be compared
where they differ (``recipes/lab``). It is made when it is first asked for, which takes some minutes
on two cores. One machine makes the same weights again; another may differ by rounding,
which training amplifies.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro.experiments.assets.models import require_modules
from lorapro.experiments.assets.tables import table_from_folders

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pretraining", "llama_from_folders", "pretrain", "token_rows"]


@dataclass(frozen=True)
class Pretraining:
    """Shape of a model and how it is trained: AdamW, linear warm-up and decay, no weight decay."""

    held_out: float = 0.05
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    length: int = 64
    steps: int = 700
    batch: int = 96
    learning_rate: float = 3e-3
    warmup: float = 0.1
    seed: int = 0


def llama_from_folders(source: Path, target: Path) -> None:
    """Pretrain on the text files of ``<label>/<name>.txt``; write model and tokenizer.

    Raises:
        UserError: no such file; torch or transformers is not installed.
    """
    require_modules(("torch", "transformers", "tokenizers"), "a pretrained model")
    with tempfile.TemporaryDirectory() as scratch:
        table_from_folders(source, Path(scratch))
        lines = (Path(scratch) / "table.jsonl").read_text(encoding="utf-8").splitlines()
    pretrain([json.loads(line)["text"] for line in lines], target, Pretraining())


def pretrain(texts: list[str], target: Path, recipe: Pretraining) -> float:
    """Train tokenizer and model, write both to ``target``; return the held-out loss per token.

    ``pretraining.json`` beside them holds the recipe and that loss.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = list(texts)
    random.Random(recipe.seed).shuffle(texts)
    cut = max(1, int(len(texts) * recipe.held_out))
    tokenizer = _train_tokenizer(texts[cut:], recipe.vocabulary)
    rows, held_out = (token_rows(t, tokenizer, recipe.length) for t in (texts[cut:], texts[:cut]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.hidden,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                intermediate_size=recipe.mlp,
                max_position_embeddings=4 * recipe.length,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=False,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.0)
        rise = max(1, round(recipe.steps * recipe.warmup))
        for step, index in enumerate(_batches(len(rows), recipe)):
            share = min((step + 1) / rise, (recipe.steps - step) / max(1, recipe.steps - rise))
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * share
            batch = rows[index]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) for part in held_out.split(64)]
    loss = sum(losses) / len(losses)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    made = {**asdict(recipe), "held_out_loss": loss}
    (target / "pretraining.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return loss


def token_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Texts as one stream of tokens, an end token after each, cut into rows: (rows, length)."""
    import torch

    encoded: Any = tokenizer(texts, add_special_tokens=False)["input_ids"]
    end = int(tokenizer.eos_token_id)
    stream = [token for ids in encoded for token in (*ids, end)]
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


def _train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the texts: any other text can be written with it, too."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|end|>"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=end, bos_token=end
    )


def _batches(count: int, recipe: Pretraining) -> Iterator[Tensor]:
    """Indices of ``steps`` batches, epoch after epoch."""
    import torch

    order = torch.empty(0, dtype=torch.long)
    for _ in range(recipe.steps):
        while len(order) < recipe.batch:
            order = torch.cat([order, torch.randperm(count)])
        yield order[: recipe.batch]
        order = order[recipe.batch :]
