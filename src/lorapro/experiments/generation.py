"""Batched generation of answers, and the file they are kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generate", "left_pad", "save_records"]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Any, Any]:
    """Return ``(input_ids, attention_mask)``, each (batch, longest), padded on the left.

    A decoder continues the last position, so padding goes before the prompt; the mask keeps it out
    of attention and out of the position numbers.
    """
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue token-id prompts, batched; return the decoded continuations in order.

    Prompts of similar length share a batch. Temperature 0 is greedy; else tokens are drawn, the
    same ones each time, and torch's random state is left as it was. ``on_batch`` is called with
    each batch's size.
    """
    import torch

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    random_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = left_pad([prompts[i] for i in chosen], int(tokenizer.pad_token_id))
            with torch.no_grad():
                out: Any = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    **sampling,
                    num_beams=1,
                    pad_token_id=int(tokenizer.pad_token_id),
                    eos_token_id=int(tokenizer.eos_token_id),
                )
            decoded = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, decoded, strict=True):
                texts[i] = text
            if on_batch is not None:
                on_batch(len(chosen))
    finally:
        torch.set_rng_state(random_state)
        model.train(was_training)
    return texts


def save_records(records: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Write what was said, one JSON object a line, whole or not at all; nothing without a path."""
    if path is None:
        return
    scratch = path.with_name(path.name + ".part")
    with scratch.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(scratch, path)
