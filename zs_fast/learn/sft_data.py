"""Files of conversations -> token ids with a loss mask on what the assistant wrote.

Rows of .jsonl, .jsonl.gz or .json (a list) in one of four forms, told apart by their keys:

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    {"instruction": "...", "input": "..." (may be absent or empty), "output": "..."}          (alpaca)
    {"conversations": [{"from": "system" | "human" | "gpt", "value": "..."}, ...]}            (sharegpt)

Each part of a conversation is encoded by itself, split where sampling would start and end: so that the ids before the
assistant's words are those of the prompt it will be sampled from. The texts are trusted: special tokens spelled in them
become special tokens.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from zs_fast.errors import DataError

SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class SftExample:
    """Token ids, and for each whether the model learns to write it.

    `SftExample(input_ids=(5, 6, 2), loss_mask=(False, True, True))` has the prompt 5 and the completion 6, 2.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    @classmethod
    def from_segments(cls, segments: Iterable[tuple[Sequence[int], bool]]) -> Self:
        """The example of (token ids, does the model learn to write them?) segments, laid end to end."""
        ids: list[int] = []
        mask: list[bool] = []
        for segment, is_loss in segments:
            ids += segment
            mask += [is_loss] * len(segment)
        return cls(input_ids=tuple(ids), loss_mask=tuple(mask))


@dataclass(frozen=True, slots=True)
class Message:
    """`Message("user", "who wrote emma?")`"""

    role: str
    content: str


def read_conversations(path: str | Path) -> list[tuple[Message, ...]]:
    """The file's conversations, in order. DataError that names file, row and field when a row is not as it must be."""
    source = Path(os.path.expanduser(path))
    if not os.path.isfile(source):
        raise DataError(f"{source}: no such file. Fine-tuning reads a .jsonl, .jsonl.gz or .json file of examples.")
    conversations = [_conversation(row, f"{source}, row {number}") for number, row in _rows(source)]
    if not conversations:
        raise DataError(f"{source} holds no examples")
    return conversations


def encode_conversation(conversation: Sequence[Message], tokenizer: Any, *, chat_template: bool) -> SftExample:
    """Ids of the whole conversation; the loss falls on the assistant's words and the token that ends its turn.

    With `chat_template` (and a tokenizer that has one) as the template renders it; else the texts follow one another,
    a system text set off by an empty line, and the tokenizer's end token closes each assistant turn.
    """
    if chat_template and tokenizer.chat_template:
        pieces = _chat_pieces(conversation, tokenizer)
    else:
        pieces = [
            (m.content + "\n\n" if m.role == "system" else m.content, m.role == "assistant") for m in conversation
        ]
    start = _start_ids(tokenizer) if not (chat_template and tokenizer.chat_template) else []
    segments: list[tuple[list[int], bool]] = [(start, False)]
    for text, is_assistant in pieces:
        piece: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if is_assistant and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in piece:
            piece = [*piece, tokenizer.eos_token_id]
        end = _turn_end(piece, tokenizer.eos_token_id) if is_assistant else 0
        segments += [(piece[:end], True), (piece[end:], False)]
    return SftExample.from_segments(segments)


def _rows(source: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, parsed row)"""
    try:
        raw = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{source} can't be read: {error}") from error
    if source.suffix == ".json":
        rows = _parse(text, str(source))
        if not isinstance(rows, list):
            raise DataError(f"{source} must hold a list of examples, got {type(rows).__name__}")
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line, f"{source}, row {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _conversation(row: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object, got {type(row).__name__}")
    if "messages" in row:
        messages = _messages(row, "messages", "role", "content", {role: role for role in ROLES}, where)
    elif "conversations" in row:
        messages = _messages(row, "conversations", "from", "value", SHAREGPT_ROLES, where)
    elif "completion" in row:
        messages = [Message("user", _text(row, "prompt", where)), Message("assistant", _text(row, "completion", where))]
    elif "output" in row:
        extra = _text(row, "input", where) if row.get("input") else ""
        instruction = _text(row, "instruction", where)
        prompt = "\n\n".join(part for part in (instruction, extra) if part)
        messages = [Message("user", prompt), Message("assistant", _text(row, "output", where))]
    else:
        raise DataError(
            f"{where} has the fields {', '.join(sorted(row)) or 'none'}; expected prompt + completion, messages, "
            "instruction + output, or conversations"
        )
    if messages[0].role == "assistant" or all(message.role != "assistant" for message in messages):
        raise DataError(f"{where}: a conversation needs an assistant's message, and something before it")
    return tuple(messages)


def _messages(
    row: dict[str, Any], field: str, role_key: str, text_key: str, roles: dict[str, str], where: str
) -> list[Message]:
    entries = row[field]
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}, field {field}: must be a list of messages, got {entries!r}"[:300])
    messages = []
    for number, entry in enumerate(entries, start=1):
        here = f"{where}, field {field}, message {number}"
        if not isinstance(entry, dict) or entry.get(role_key) not in roles:
            got = entry.get(role_key) if isinstance(entry, dict) else entry
            raise DataError(f"{here}: {role_key} must be one of {', '.join(roles)}, got {got!r}"[:400])
        messages.append(Message(roles[entry[role_key]], _text(entry, text_key, here)))
    return messages


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}, field {field}: must be text that isn't empty, got {value!r}"[:400])
    return value


def _chat_pieces(conversation: Sequence[Message], tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, written by the assistant?) pieces that together are the rendered conversation."""
    messages = [{"role": message.role, "content": message.content} for message in conversation]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(conversation):
        if message.role != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                "the tokenizer's chat template rewrites earlier turns of a conversation, so that its parts can't be "
                "told apart. Give one assistant message per example, or set model.chat_template = false."
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def _start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (a start token, or nothing)."""
    ids: list[int] = tokenizer("")["input_ids"]
    return [index for index in ids if index != tokenizer.eos_token_id]


def _turn_end(piece: list[int], eos_token_id: int | None) -> int:
    """Length of an assistant's piece up to its last end token; what a template puts after it is never sampled."""
    positions = [position for position, index in enumerate(piece) if index == eos_token_id]
    return positions[-1] + 1 if positions else len(piece)
