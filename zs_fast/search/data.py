"""Questions from files, folders or the hub, checked whole before use, and the order in which a run plays them.

Every row becomes one Question or the load fails with one DataError that names file, row or line, field, reason and an
excerpt of the value. No row is ever dropped.

Where a field is taken from (the first row, or the schema, decides for the whole file):
    text      `question`, else `extra_info.question`
    answers   `golden_answers`, else `reward_model.ground_truth.target` (both lists of strings),
              else `answers`, else `answer` (each a string or a list of strings)
    source    `data_source`, else the file's or data set's name
    id        `<source>:<id>` with the row's `id` (string or integer), else `<source>:<row number>`, counting from 1
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from zs_fast.errors import ConfigError, DataError
from zs_fast.search import hub
from zs_fast.search.readers import (
    JSON_LINES_SUFFIXES,
    PARQUET_SUFFIXES,
    Row,
    bad_value,
    excerpt,
    is_json_lines,
    is_parquet,
    parquet_schema,
    read_json_lines,
    read_parquet,
)
from zs_fast.search.reward import normalise
from zs_fast.system.seeds import seed_for
from zs_fast.types import Question

logger = logging.getLogger(__name__)

FieldPath = tuple[str, ...]

TEXT_FIELDS: tuple[FieldPath, ...] = (("question",), ("extra_info", "question"))
ANSWER_FIELDS: tuple[FieldPath, ...] = (
    ("golden_answers",),
    ("reward_model", "ground_truth", "target"),
    ("answers",),
    ("answer",),
)
LIST_ONLY: tuple[FieldPath, ...] = ANSWER_FIELDS[:2]
MAX_TEXT_CHARACTERS = 100_000
MAX_ID_CHARACTERS = 512
WORLD_FOLDER = Path(__file__).parent.parent / "quickstart" / "world"
QUICKSTART = {"quickstart:train": "train.jsonl", "quickstart:heldout": "heldout.jsonl"}
ACCEPTED = (
    f"Give a file ({', '.join(PARQUET_SUFFIXES + JSON_LINES_SUFFIXES)}), a folder of such files or one written by "
    f"datasets.save_to_disk, a hub id such as owner/name:split, or one of {', '.join(QUICKSTART)}."
)

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def load_questions(spec: str) -> list[Question]:
    """The questions that `spec` names, in file order; at least one. Raises DataError (see the module docstring).

    `spec`: a ZeroSearch or Search-R1 .parquet, a FlashRAG .jsonl or .jsonl.gz, a local copy of a data set
    repository or a folder written by `datasets.save_to_disk` (`folder[:split]` both), a hub id
    `owner/name[/configuration][:split]`, `quickstart:train` or `quickstart:heldout`.
    """
    if spec in QUICKSTART:
        return _load_file(WORLD_FOLDER / QUICKSTART[spec])
    if not spec.strip() or "\0" in spec or spec.startswith("quickstart:"):
        raise DataError(f"data is {spec!r}, which names no data set. {ACCEPTED}")
    path = Path(os.path.expanduser(spec))
    folder, split = hub.split_spec(spec)
    folder = os.path.expanduser(folder)
    try:
        if path.is_file():
            return _load_file(path)
        if Path(folder).is_dir():
            return _load_folder(Path(folder), split)
        if path.exists():
            raise DataError(f"{path}: is neither a file nor a folder. {ACCEPTED}")
    except OSError as error:
        raise DataError(f"{excerpt(spec)}: can't be read ({error.strerror or error}). {ACCEPTED}") from error
    if hub.is_hub_id(spec) and not _looks_like_file(spec):
        return _load_table(hub.open_hub(spec))
    raise DataError(f"{path}: there is no such file or folder{_nearest(path)}. {ACCEPTED}")


def _looks_like_file(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or is_json_lines(Path(spec)) or is_parquet(Path(spec))


def _nearest(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _load_folder(folder: Path, split: str | None) -> list[Question]:
    if hub.is_saved(folder):
        return _load_table(hub.open_folder(folder, split))
    paths = hub.repository_files(folder, split)
    label = paths[0] if len(paths) == 1 else paths[0].parent
    return _load_files(str(label), folder.resolve().name, paths)


def _load_file(path: Path) -> list[Question]:
    if not is_parquet(path) and not is_json_lines(path):
        raise DataError(f"{path}: the name ends in {path.suffix!r}, which says no known format. {ACCEPTED}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    return _load_files(str(path), path.name.split(".")[0], [path])


def _load_files(label: str, name: str, paths: Sequence[Path]) -> list[Question]:
    """One data set out of files of one format, in this order; the first one decides about the fields."""
    if is_parquet(paths[0]):
        schema, *_ = [parquet_schema(path) for path in paths]
        fields = _choose_fields(str(paths[0]), "all rows", schema.names, lambda field: _in_schema(schema, field))
        return _questions(label, name, fields, _read(paths, partial(read_parquet, columns=fields.columns)))
    rows = _read(paths, read_json_lines)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{label}: holds 0 rows.")
    where, row = first
    fields = _choose_fields(label, where, list(row), lambda field: _in_row(row, field))
    return _questions(label, name, fields, chain([first], rows))


def _read(paths: Sequence[Path], read: Callable[[Path], Iterable[Row]]) -> Iterator[Row]:
    """The rows of all files; where there are several, a row's place names its file."""
    for path in paths:
        for where, row in read(path):
            yield (f"{path.name}, {where}" if len(paths) > 1 else where), row


def _load_table(table: hub.Table) -> list[Question]:
    schema = table.schema
    fields = _choose_fields(table.label, "all rows", schema.names, lambda field: _in_schema(schema, field))
    return _questions(table.label, table.name, fields, table.rows(fields.columns))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fields:
    """Where a file keeps what a Question needs; None where it keeps none."""

    text: FieldPath
    answers: FieldPath
    source: FieldPath | None
    id: FieldPath | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The top-level columns that are read."""
        paths = (self.text, self.answers, self.source, self.id)
        return tuple(dict.fromkeys(path[0] for path in paths if path is not None))


def _choose_fields(file: str, where: str, names: Sequence[str], has: Callable[[FieldPath], bool]) -> _Fields:
    def choose(candidates: Sequence[FieldPath]) -> FieldPath:
        found = next((field for field in candidates if has(field)), None)
        if found is None:
            near = difflib.get_close_matches(candidates[0][0], names, n=1)
            hint = f"; did you mean to rename '{near[0]}'?" if near else ""
            others = ", ".join(_dotted(field) for field in candidates[1:])
            raise bad_value(
                file, where, _dotted(candidates[0]), f"is missing (so is {others}){hint} There is", ", ".join(names)
            )
        return found

    return _Fields(
        text=choose(TEXT_FIELDS),
        answers=choose(ANSWER_FIELDS),
        source=("data_source",) if has(("data_source",)) else None,
        id=("id",) if has(("id",)) else None,
    )


def _in_row(row: Mapping[str, Any], field: FieldPath) -> bool:
    value: Any = row
    for name in field:
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def _in_schema(schema: Any, field: FieldPath) -> bool:
    if field[0] not in schema.names:
        return False
    kind = schema.field(field[0]).type
    for name in field[1:]:
        children = [kind.field(index).name for index in range(kind.num_fields)]
        if name not in children:
            return False
        kind = kind.field(children.index(name)).type
    return True


def _questions(file: str, name: str, fields: _Fields, rows: Iterable[Row]) -> list[Question]:
    questions: list[Question] = []
    seen: dict[str, str] = {}
    unmatchable: list[tuple[str, str]] = []
    for number, (where, row) in enumerate(rows, start=1):
        source = name if fields.source is None else _text(file, where, fields.source, row)
        own_id = str(number) if fields.id is None else _id(file, where, fields.id, row)
        question_id = f"{source}:{own_id}"
        if question_id in seen:
            raise bad_value(file, where, "id", f"is a duplicate of {seen[question_id]} (source {source})", own_id)
        seen[question_id] = where
        text = _text(file, where, fields.text, row)
        answers = _answers(file, where, fields.answers, row, unmatchable)
        questions.append(Question(id=question_id, text=text, answers=answers, source=source))
    if not questions:
        raise DataError(f"{file}: holds 0 rows.")
    if unmatchable:
        where, alias = unmatchable[0]
        logger.warning(
            "%s: %d accepted answers have nothing left after normalisation and can never match (first: %s, %r). Their "
            "rows keep the other answers.", file, len(unmatchable), where, alias,
        )  # fmt: skip
    return questions


def _get(file: str, where: str, field: FieldPath, row: Mapping[str, Any]) -> Any:
    value: Any = row
    for depth, name in enumerate(field, start=1):
        if not isinstance(value, Mapping):
            kind = _kind(value)
            raise bad_value(file, where, _dotted(field[: depth - 1]), f"is {kind}, not an object", value)
        if name not in value:
            raise bad_value(file, where, _dotted(field[:depth]), "is missing. There is", ", ".join(map(str, value)))
        value = value[name]
    return value


def _text(file: str, where: str, field: FieldPath, row: Mapping[str, Any]) -> str:
    return _checked_text(file, where, _dotted(field), _get(file, where, field, row))


def _checked_text(file: str, where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_value(file, where, field, f"is {_kind(value)}, not a string", value)
    if not value.strip():
        raise bad_value(file, where, field, "is empty", repr(value))
    if "\0" in value:
        raise bad_value(file, where, field, "holds a NUL character", value)
    if _SURROGATE.search(value):
        raise bad_value(file, where, field, "holds half of a surrogate pair, which is no character", value)
    if len(value) > MAX_TEXT_CHARACTERS:
        raise bad_value(
            file, where, field, f"has {len(value)} characters; at most {MAX_TEXT_CHARACTERS} are read", value
        )
    return value.strip()


def _id(file: str, where: str, field: FieldPath, row: Mapping[str, Any]) -> str:
    value = _get(file, where, field, row)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _checked_text(file, where, _dotted(field), value)
    if len(text) > MAX_ID_CHARACTERS or _CONTROL.search(text):
        reason = f"must be one line of at most {MAX_ID_CHARACTERS} characters"
        raise bad_value(file, where, _dotted(field), reason, text)
    return text


def _answers(
    file: str, where: str, field: FieldPath, row: Mapping[str, Any], unmatchable: list[tuple[str, str]]
) -> tuple[str, ...]:
    value = _get(file, where, field, row)
    name = _dotted(field)
    if isinstance(value, str) and field not in LIST_ONLY:
        value = [value]
    if not isinstance(value, list):
        raise bad_value(file, where, name, f"is {_kind(value)}, not a list of strings", value)
    if not value:
        raise bad_value(file, where, name, "is an empty list; a question needs at least one accepted answer", "[]")
    answers = [_checked_text(file, where, f"{name}[{index}]", answer) for index, answer in enumerate(value)]
    matchable = [answer for answer in answers if normalise(answer)]
    if not matchable:
        reason = (
            "has nothing left after normalisation (lower case, no punctuation, no a/an/the), so nothing can match it"
        )
        raise bad_value(file, where, name, reason, value)
    unmatchable.extend((where, answer) for answer in answers if answer not in matchable)
    return tuple(matchable)


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object"
    names = {str: "a string", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _dotted(field: FieldPath) -> str:
    return ".".join(field)


class QuestionOrder:
    """Which questions each step plays: a new shuffle every epoch, a pure function of the seed and the question ids.

    Nothing is stored between calls, so a run resumes by its step alone; the order of the rows in the file has no part
    in it. No question is left out at the end of an epoch: the batch takes its rest from the next one. Such a batch
    would now and then hold a question twice, and its trajectories would be drawn with the same seeds; those questions
    move behind the batch, within the new epoch.
    """

    def __init__(self, questions: Sequence[Question], seed: int) -> None:
        if not questions:
            raise DataError("There are 0 questions to order.")
        self._by_id = {question.id: question for question in questions}
        if len(self._by_id) != len(questions):
            ids = [question.id for question in questions]
            repeated = next(id_ for id_ in ids if ids.count(id_) > 1)
            raise DataError(f"The question id {repeated!r} is not unique; give each data set its own data_source.")
        self._seed = seed
        self._orders: dict[tuple[int, int], list[str]] = {}

    def batch(self, step: int, size: int) -> list[Question]:
        """The `size` questions of `step` (from 0), all different; steps must share one `size`.

        Raises ConfigError if there are fewer than `size` questions.
        """
        count = len(self._by_id)
        if not 1 <= size <= count:
            raise ConfigError(
                f"train.questions_per_step is {size}, but the data holds {count} questions and a step plays each at "
                f"most once. Lower it to {count} or less, or give more data."
            )
        first = step * size
        ids: list[str] = []
        while len(ids) < size:
            epoch, offset = divmod(first + len(ids), count)
            ids += self._order(epoch, size)[offset : offset + size - len(ids)]
        return [self._by_id[id_] for id_ in ids]

    def _order(self, epoch: int, size: int) -> list[str]:
        """The ids in the order in which `epoch` plays them in batches of `size`. The last two are kept."""
        if (epoch, size) not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch, size] = self._make_order(epoch, size)
        return self._orders[epoch, size]

    def _make_order(self, epoch: int, size: int) -> list[str]:
        count = len(self._by_id)
        # Moving repeats touches the first `size` places of an epoch, so from two batches on the end of an epoch is that
        # of its plain shuffle. With fewer, go back to an epoch that starts with a batch of its own, or a known one.
        begin = max(epoch - 1, 0)
        while count < 2 * size and begin * count % size and (begin, size) not in self._orders:
            begin -= 1
        order = self._orders.get((begin, size)) or self._shuffle(begin)
        for current in range(begin + 1, epoch + 1):
            taken = current * count % size
            shuffled = self._shuffle(current)
            order = _without_repeats(shuffled, set(order[-taken:]), size - taken) if taken else shuffled
        return order

    def _shuffle(self, epoch: int) -> list[str]:
        keyed = [(seed_for(self._seed, step=epoch, question_id=id_, purpose="order"), id_) for id_ in self._by_id]
        return [id_ for _, id_ in sorted(keyed)]


def _without_repeats(order: list[str], taken: set[str], length: int) -> list[str]:
    """`order` with its first `length` places filled by the first ids that are not in `taken`; the rest in order."""
    head: list[str] = []
    rest: list[str] = []
    for id_ in order:
        (head if len(head) < length and id_ not in taken else rest).append(id_)
    return head + rest
