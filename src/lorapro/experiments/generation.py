"""Exact match of generated answers: batched greedy generation and answer extraction."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro.experiments.statistics import wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Score", "exact_match", "extract_answer", "generate", "left_pad"]

_MARKED = re.compile(r"####\s*\$?\s*([-+]?\$?\s*[\d,]*\.?\d+)")
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")


def _normalize(number: str) -> str | None:
    cleaned = re.sub(r"[,$\s]", "", number)
    try:
        value = Decimal(cleaned)
    except InvalidOperation:
        return None
    text = format(value.normalize(), "f")
    return "0" if text == "-0" else text


def extract_answer(text: str) -> str | None:
    """Return the number a text answers with, in a normal form, or ``None``.

    The number after the first ``####``; without such a mark, the last number of the text. Commas,
    dollar signs, a plus sign, trailing zeros and a trailing full stop are dropped.

    >>> extract_answer("so 3 x 4 = 12 in all.\\n#### 1,200.50")
    '1200.5'
    >>> extract_answer("She pays $18.")
    '18'
    >>> extract_answer("I do not know.") is None
    True
    """
    marked = _MARKED.search(text)
    if marked:
        return _normalize(marked.group(1))
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    found = last.group()
    # "5-3": the sign is a minus between numbers, not part of the last one.
    if found[0] in "+-" and last.start() > 0 and text[last.start() - 1].isalnum():
        found = found[1:]
    return _normalize(found)


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


@dataclass(frozen=True)
class Score:
    """How many of ``total`` answers were right, with a 95 % Wilson interval."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.total

    def as_dict(self) -> dict[str, float]:
        """Accuracy, interval and counts, as they are written to result files."""
        low, high = wilson_interval(self.correct, self.total)
        return {
            "exact_match": self.accuracy,
            "exact_match_low": low,
            "exact_match_high": high,
            "exact_match_correct": self.correct,
            "exact_match_total": self.total,
        }


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    prompts: Sequence[Sequence[int]],
    save_to: Path | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Score:
    """Answer the questions of ``rows`` and compare the numbers with those of their answers.

    Args:
        model: a causal language model (with or without adapters).
        tokenizer: its tokenizer.
        rows: dictionaries with ``question`` and ``answer``.
        prompts: token ids of each row's prompt.
        batch_size: prompts generated together.
        max_new_tokens: longest answer.
        save_to: write question, truth, generated text and verdict there, one JSON object a line.
        on_batch: called with the number of questions each time some are done.
    """
    texts = generate(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        on_batch=on_batch,
    )
    records = []
    for row, text in zip(rows, texts, strict=True):
        truth, answer = extract_answer(str(row["answer"])), extract_answer(text)
        records.append(
            {
                "question": row["question"],
                "generated": text,
                "answer": answer,
                "truth": truth,
                "correct": answer is not None and answer == truth,
            }
        )
    if save_to is not None:
        scratch = save_to.with_name(save_to.name + ".part")
        with scratch.open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(scratch, save_to)
    return Score(sum(record["correct"] for record in records), len(records))
