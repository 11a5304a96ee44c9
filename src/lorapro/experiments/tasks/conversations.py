"""Rows as conversations, and conversations as tokens with labels on the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorapro.experiments.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_messages", "messages_of", "prompt_and_answer"]

IGNORED = -100
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's keys and roles.
_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

Messages = list[dict[str, Any]]


def messages_of(value: Any, where: str, *, answered: bool = True) -> Messages:
    """Return a cell as a list of ``{"role": ..., "content": ...}`` that ends with an answer.

    With ``answered`` false it ends with a question: a last answer is left out.

    ShareGPT's ``{"from": "human", "value": ...}`` is read too, and a list written as JSON, as in a
    CSV. Messages keep further keys, such as ``tool_calls``.

    Args:
        value: the cell.
        where: "row 3 of chat.jsonl", for errors.
        answered: whether the answer is wanted.

    Raises:
        UserError: not such a list, a role that no template knows, no answer to learn from.

    >>> messages_of([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}], "row 1")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes?'}]
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f"{where} holds a text, expected a list of messages") from None
    if hasattr(value, "tolist"):  # an array, as Parquet gives it
        value = value.tolist()
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{where} holds {_short(value)}, expected a list of messages")
    messages = [_message(message, where) for message in value]
    if not answered:
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"{where} holds an answer only, expected what it is an answer to")
        return messages
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: the last message is {messages[-1]['role']!r}, expected an answer of "
            "'assistant' to learn from"
        )
    if len(messages) == 1:
        raise UserError(f"{where} holds an answer only, expected what it is an answer to")
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise UserError(f"{where}: the last answer is empty, so there is nothing to learn from")
    return messages


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} holds {_short(message)}, expected messages with role and content")
    role = message.get("role", message.get("from"))
    role = _ALIASES.get(role, role)
    content = _text_of(message.get("content", message.get("value")), where)
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if content is None and not message.get("tool_calls"):
        raise UserError(f"{where}: a message of {role!r} has no content")
    kept = {k: v for k, v in message.items() if k not in ("from", "value") and v is not None}
    return {**kept, "role": role, "content": "" if content is None else content}


def _text_of(content: Any, where: str) -> str | None:
    """A message's text, also of one in parts of type text."""
    if content is None or isinstance(content, str):
        return content
    content = content.tolist() if hasattr(content, "tolist") else content
    if isinstance(content, list) and content and all(isinstance(p, Mapping) for p in content):
        for part in content:
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                raise UserError(
                    f"{where}: a message holds a part of type {part.get('type')!r}; this task "
                    "reads text only"
                )
        return "".join(part["text"] for part in content)
    raise UserError(f"{where}: the content of a message is {_short(content)}, expected a text")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def prompt_and_answer(messages: Messages) -> tuple[Messages, str]:
    """Everything before the last answer, and the last answer."""
    return messages[:-1], str(messages[-1]["content"])


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str,
    *,
    answers_only: bool = True,
    tools: Any = None,
) -> dict[str, list[int]]:
    """Tokens of a conversation in the tokenizer's chat template, labels on what assistants say.

    The conversation is written out once; an answer is the characters that its turn adds after the
    prompt for it, so no token is cut otherwise than the model reads it.

    Raises:
        UserError: a template that rewrites earlier turns (then where an answer lies is not to be
            told), or one that refuses the messages.
    """

    def written(count: int, ask: bool = False) -> str:
        try:
            text: Any = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=ask, tools=tools
            )
        except Exception as error:  # jinja2's, by the template's own words
            raise UserError(f"{where}: the chat template refuses it: {error}") from error
        return str(text)

    whole = written(len(messages))
    ids = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    if not answers_only:
        return {"input_ids": list(ids["input_ids"]), "labels": list(ids["input_ids"])}
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = written(number, ask=True), written(number + 1)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{where}: the chat template rewrites earlier turns, so which tokens are answer "
                f"{number + 1} is not to be told; take conversations of one answer, or "
                "answers_only false"
            )
        spans.append((len(before), len(after.rstrip())))
    labels = [
        token if any(start <= left < end for start, end in spans) else IGNORED
        for token, (left, _) in zip(ids["input_ids"], ids["offset_mapping"], strict=True)
    ]
    return {"input_ids": list(ids["input_ids"]), "labels": labels}
