"""What turns a package's own files into the data file or model folder that a task opens.

A builder gets the unpacked folder and an empty target folder. It may leave the target half done
when it raises: ``assets.fetch`` then keeps nothing.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from lorapro.experiments.errors import UserError

__all__ = ["dequantize_gguf", "table_from_folders"]


def dequantize_gguf(source: Path, target: Path) -> None:
    """Turn the one GGUF file in ``source`` into float32 safetensors and tokenizer in ``target``.

    Raises:
        UserError: transformers or gguf is not installed.
    """
    _require(("transformers", "gguf"), "a GGUF model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        (gguf,) = source.glob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, dtype=torch.float32
        )
        config = loaded.config
        # The tensors are ordinary float32 by now; the entry would make every later load treat the
        # folder as a quantized model, and refuses to be saved.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    finally:
        logging.enable_progress_bar()


def table_from_folders(source: Path, target: Path) -> None:
    """Write ``table.jsonl`` from text files that lie in one folder per label.

    Each file ``<label>/<name>.txt`` becomes a row with the columns ``text`` (the whole file, title
    line included) and ``label``, in the order of their paths. Files are UTF-8; one that is not is
    read as Windows-1252, in which every byte that occurs in English prose has a meaning.

    Raises:
        UserError: no such file.
    """
    files = sorted(source.glob("*/*.txt"))
    if not files:
        raise UserError("the package holds no text files in folders named after their labels")
    with (target / "table.jsonl").open("w", encoding="utf-8") as stream:
        for file in files:
            row = {"text": _decode(file.read_bytes()).strip(), "label": file.parent.name}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _require(modules: Sequence[str], what: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"converting {what} needs the package {module!r}, which is not installed; "
                "run: pip install 'lorapro[experiments]'"
            )
