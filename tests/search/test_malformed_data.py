"""Malformed data files: each gives one DataError that names file, row or line, field and reason, and nothing else.

A mutator spoils one place of a good file; the seed chooses which. The fast tier runs 3 seeds of each, `full` 10, and
flips random bytes besides: then a file loads whole or fails with one DataError.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zs_fast.errors import DataError
from zs_fast.search import readers
from zs_fast.search.data import load_questions

Rows = list[dict[str, Any]]
NUM_ROWS = 9
MISSING = object()


def good_rows(seed: int) -> Rows:
    draws = random.Random(seed)
    return [
        {
            "id": f"train_{number}",
            "question": f"what is number {draws.randrange(10**6)}?",
            "golden_answers": [f"gold {draws.randrange(10**6)}" for _ in range(draws.randint(1, 3))],
            "data_source": draws.choice(["nq", "hotpotqa"]),
        }
        for number in range(NUM_ROWS)
    ]


def lines(rows: Rows) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def check(path: Path, where: str, field: str, reason: str = "") -> None:
    """Loading `path` gives one DataError: one line, exit code 2, and every part in it."""
    with pytest.raises(DataError) as caught:
        load_questions(str(path))
    message = str(caught.value)
    assert type(caught.value) is DataError and caught.value.exit_code == 2
    assert str(path) in message
    assert re.search(rf"\b{where}\b", message), (where, message)
    assert f"field '{field}" in message, (field, message)
    assert reason in message, (reason, message)
    assert "\n" not in message and len(message) < len(str(path)) + 500


# One value in one row: (field to spoil, value, field named in the message, words of the reason)

VALUES: dict[str, tuple[str, Any, str, str]] = {
    "question_missing": ("question", MISSING, "question", "is missing"),
    "question_null": ("question", None, "question", "is null"),
    "question_empty": ("question", "", "question", "is empty"),
    "question_blank": ("question", " \t\n", "question", "is empty"),
    "question_number": ("question", 17, "question", "is a number"),
    "question_nan": ("question", math.nan, "question", "is a number"),
    "question_boolean": ("question", True, "question", "is a boolean"),
    "question_list": ("question", ["who?"], "question", "is a list"),
    "question_object": ("question", {"text": "who?"}, "question", "is an object"),
    "question_nul": ("question", "who\0?", "question", "NUL"),
    "question_surrogate": ("question", "who \ud800?", "question", "surrogate"),
    "question_huge": ("question", "who " * 30_000, "question", "120000 characters"),
    "answers_missing": ("golden_answers", MISSING, "golden_answers", "is missing"),
    "answers_null": ("golden_answers", None, "golden_answers", "is null"),
    "answers_nan": ("golden_answers", math.nan, "golden_answers", "is a number"),
    "answers_string": ("golden_answers", "['gold']", "golden_answers", "is a string"),
    "answers_number": ("golden_answers", 1999, "golden_answers", "is a number"),
    "answers_object": ("golden_answers", {"target": ["gold"]}, "golden_answers", "is an object"),
    "answers_empty": ("golden_answers", [], "golden_answers", "is an empty list"),
    "answer_null": ("golden_answers", ["gold", None], "golden_answers[1]", "is null"),
    "answer_nan": ("golden_answers", [math.nan], "golden_answers[0]", "is a number"),
    "answer_number": ("golden_answers", ["gold", 7], "golden_answers[1]", "is a number"),
    "answer_list": ("golden_answers", [["gold"]], "golden_answers[0]", "is a list"),
    "answer_empty": ("golden_answers", ["gold", ""], "golden_answers[1]", "is empty"),
    "answer_blank": ("golden_answers", ["  "], "golden_answers[0]", "is empty"),
    "answer_nul": ("golden_answers", ["go\0ld"], "golden_answers[0]", "NUL"),
    "answer_surrogate": ("golden_answers", ["\udfff"], "golden_answers[0]", "surrogate"),
    "answer_huge": ("golden_answers", ["x" * 100_001], "golden_answers[0]", "100001 characters"),
    "answers_punctuation": ("golden_answers", ["!?", "..."], "golden_answers", "nothing left after normalisation"),
    "answers_article": ("golden_answers", ["The", "an"], "golden_answers", "nothing left after normalisation"),
    "id_missing": ("id", MISSING, "id", "is missing"),
    "id_null": ("id", None, "id", "is null"),
    "id_empty": ("id", "", "id", "is empty"),
    "id_float": ("id", 1.5, "id", "is a number"),
    "id_boolean": ("id", False, "id", "is a boolean"),
    "id_two_lines": ("id", "a\nb", "id", "one line"),
    "id_huge": ("id", "x" * 513, "id", "512"),
    "source_missing": ("data_source", MISSING, "data_source", "is missing"),
    "source_null": ("data_source", None, "data_source", "is null"),
    "source_list": ("data_source", ["nq"], "data_source", "is a list"),
}
TYPES_IN_PARQUET = {"question": str, "id": str, "data_source": str, "golden_answers": list}


def spoil(rows: Rows, index: int, field: str, value: Any) -> None:
    if value is MISSING:
        del rows[index][field]
    else:
        rows[index][field] = value


def seeds_of(names: Any, fast: int = 3, full: int = 10) -> list[Any]:
    return [
        pytest.param(name, seed, marks=[pytest.mark.full] if seed >= fast else [], id=f"{name}-{seed}")
        for name in names
        for seed in range(full)
    ]


@pytest.mark.parametrize(("name", "seed"), seeds_of(VALUES))
def test_one_bad_value_in_jsonl(tmp_path: Path, name: str, seed: int) -> None:
    field, value, named, reason = VALUES[name]
    rows = good_rows(seed)
    index = random.Random(seed).randrange(1, NUM_ROWS)
    spoil(rows, index, field, value)
    path = tmp_path / ("a.jsonl" if seed % 2 else "a.jsonl.gz")
    content = b"\n".join(lines(rows))
    path.write_bytes(content if seed % 2 else gzip.compress(content))
    check(path, f"line {index + 1}", named, reason)


def in_parquet(name: str) -> bool:
    """Can one cell of a typed column hold this value? Lone surrogates and numbers among strings can't be written."""
    field, value, _, _ = VALUES[name]
    if value is MISSING or "surrogate" in name:
        return False
    if field == "golden_answers" and isinstance(value, list):
        return all(answer is None or isinstance(answer, str) for answer in value)
    return value is None or isinstance(value, TYPES_IN_PARQUET[field])


@pytest.mark.parametrize(("name", "seed"), seeds_of(filter(in_parquet, VALUES)))
def test_one_bad_value_in_parquet(tmp_path: Path, name: str, seed: int) -> None:
    field, value, named, reason = VALUES[name]
    rows = good_rows(seed)
    index = random.Random(seed).randrange(NUM_ROWS)
    spoil(rows, index, field, value)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    check(path, f"row {index + 1}", named, reason)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_duplicate_id_names_both_rows(tmp_path: Path, suffix: str, seed: int) -> None:
    rows = good_rows(seed)
    first, second = sorted(random.Random(seed).sample(range(NUM_ROWS), 2))
    rows[second] |= {"id": rows[first]["id"], "data_source": rows[first]["data_source"]}
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(b"\n".join(lines(rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    unit = "line" if suffix == "jsonl" else "row"
    check(path, f"{unit} {second + 1}", "id", f"is a duplicate of {unit} {first + 1}")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("columns", "named", "hint"),
    [
        ({"question": None}, "question", "is missing"),
        ({"question": "Question"}, "question", "rename 'Question'"),
        ({"golden_answers": None}, "golden_answers", "reward_model.ground_truth.target"),
        ({"golden_answers": "golden_answer"}, "golden_answers", "rename 'golden_answer'"),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(
    tmp_path: Path, suffix: str, columns: dict[str, str | None], named: str, hint: str
) -> None:
    rows = [
        {columns.get(key, key): value for key, value in row.items() if columns.get(key, key)} for row in good_rows(0)
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(b"\n".join(lines(rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    check(path, "line 1" if suffix == "jsonl" else "all rows", named, hint)


# One line of a jsonl file: (new bytes of the line, field named, reason)


def broken(line: bytes, draws: random.Random) -> bytes:
    return line[: draws.randrange(1, len(line) - 1)]


LINES: dict[str, tuple[Callable[[bytes, random.Random], bytes], str, str]] = {
    "cut": (broken, "(line)", "is not valid JSON"),
    "trailing_comma": (lambda line, _: line[:-1] + b",}", "(line)", "is not valid JSON"),
    "single_quotes": (lambda line, _: line.replace(b'"', b"'"), "(line)", "is not valid JSON"),
    "two_objects": (lambda line, _: line + line, "(line)", "is not valid JSON"),
    "list": (lambda line, _: b"[" + line + b"]", "(line)", "is a JSON list"),
    "string": (lambda line, _: b'"q"', "(line)", "is a JSON str"),
    "null": (lambda line, _: b"null", "(line)", "is a JSON NoneType"),
    "empty": (lambda line, _: b"  ", "(line)", "is empty"),
    "latin_1": (lambda line, _: line.replace(b"what", "où".encode("latin-1")), "(line)", "is not UTF-8 at byte"),
    "nul": (lambda line, _: line.replace(b"what", b"\0hat"), "(line)", "NUL bytes"),
    "hole": (lambda line, _: bytes(5000) + line, "(line)", "NUL bytes"),
    "byte_order_mark": (lambda line, _: b"\xef\xbb\xbf" + line, "(line)", "is not valid JSON"),
    "repeated_key": (lambda line, _: line[:-1] + b', "question": "other?"}', "question", "appears twice"),
    "nested_repeated_key": (lambda line, _: line[:-1] + b', "m": {"k": 1, "k": 2}}', "k", "appears twice"),
    "deep": (lambda line, _: line[:-1] + b', "m": ' + b"[" * 200_000 + b"}", "(line)", "is not valid JSON"),
    "huge_number": (lambda line, _: line[:-1] + b', "m": ' + b"9" * 10_000 + b"}", "(line)", "is not valid JSON"),
    "huge": (lambda line, _: line[:-2] + b"x" * readers.MAX_LINE_BYTES + line[-2:], "(line)", "is longer than 4194304"),
}


@pytest.mark.parametrize(("name", "seed"), seeds_of(LINES, fast=2))
def test_one_bad_line_in_jsonl(tmp_path: Path, name: str, seed: int) -> None:
    change, named, reason = LINES[name]
    draws = random.Random(seed)
    written = lines(good_rows(seed))
    index = draws.randrange(1, NUM_ROWS - 1)
    written[index] = change(written[index], draws)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(written))
    check(path, f"line {index + 1}", named, reason)


def whole(rows: Rows) -> bytes:
    return b"\n".join(lines(rows)) + b"\n"


FILES: dict[str, tuple[Callable[[Rows], bytes], str, str]] = {
    "utf_16": (lambda rows: whole(rows).decode().encode("utf-16"), "line 1", "is UTF-16"),
    "utf_16_without_mark": (lambda rows: whole(rows).decode().encode("utf-16-be"), "line 1", "NUL bytes"),
    "pretty_printed": (lambda rows: json.dumps(rows, indent=1).encode(), "line 1", "is not valid JSON"),
    "one_array": (lambda rows: json.dumps(rows).encode(), "line 1", "is a JSON list"),
    "csv": (lambda rows: b"id,question,answer\n1,who?,me\n", "line 1", "is not valid JSON"),
    "html": (lambda rows: b"<!DOCTYPE html><html>Not found</html>", "line 1", "is not valid JSON"),
    "pointer": (lambda rows: b"version https://git-lfs.github.com/spec/v1\n", "line 1", "is not valid JSON"),
    "empty_first": (lambda rows: b"\n" + whole(rows), "line 1", "is empty"),
    "only_newlines_for_long": (lambda rows: whole(rows) + b"\n" * 10**6, "line 10", "empty lines in a row"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_content_of_a_jsonl_file(tmp_path: Path, name: str) -> None:
    make, where, reason = FILES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(make(good_rows(0)))
    check(path, where, "(line)", reason)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_gzip(tmp_path: Path, damage: str, seed: int) -> None:
    content = bytearray(gzip.compress(whole(good_rows(seed))))
    path = tmp_path / "a.jsonl.gz"
    if damage == "cut":
        del content[random.Random(seed).randrange(20, len(content) - 1) :]
    else:
        content[-6] ^= 1  # the checksum
    path.write_bytes(content)
    with pytest.raises(DataError, match="gzip data is cut short or damaged") as caught:
        load_questions(str(path))
    assert str(path) in str(caught.value)


# Columns of the wrong type, and files that are no whole parquet


def with_column(rows: Rows, name: str, column: pa.Array) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    return table.set_column(table.schema.get_field_index(name), name, column)


COLUMNS: dict[str, tuple[str, pa.Array, str, str]] = {
    "question_binary": ("question", pa.array([b"who?"] * NUM_ROWS), "question", "is bytes"),
    "question_integer": ("question", pa.array(range(NUM_ROWS)), "question", "is a number"),
    "question_list": ("question", pa.array([["who?"]] * NUM_ROWS), "question", "is a list"),
    "question_null_type": ("question", pa.nulls(NUM_ROWS), "question", "is null"),
    "answers_string": ("golden_answers", pa.array(["gold"] * NUM_ROWS), "golden_answers", "is a string"),
    "answers_integers": ("golden_answers", pa.array([[1]] * NUM_ROWS), "golden_answers[0]", "is a number"),
    "answers_binaries": ("golden_answers", pa.array([[b"a"]] * NUM_ROWS), "golden_answers[0]", "is bytes"),
    "answers_struct": ("golden_answers", pa.array([{"target": ["a"]}] * NUM_ROWS), "golden_answers", "is an object"),
    "answers_nan": ("golden_answers", pa.array([math.nan] * NUM_ROWS), "golden_answers", "is a number"),
    "id_float": ("id", pa.array([0.5] * NUM_ROWS), "id", "is a number"),
    "id_timestamp": ("id", pa.array([0] * NUM_ROWS, pa.timestamp("s")), "id", "is datetime"),
    "source_integer": ("data_source", pa.array([1] * NUM_ROWS), "data_source", "is a number"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_the_wrong_type(tmp_path: Path, name: str) -> None:
    column_name, column, named, reason = COLUMNS[name]
    path = tmp_path / "a.parquet"
    pq.write_table(with_column(good_rows(0), column_name, column), path)
    check(path, "row 1", named, reason)


@pytest.mark.parametrize(
    ("reward_model", "named"),
    [
        ({"style": "rule"}, "golden_answers"),
        ({"ground_truth": "gold"}, "golden_answers"),
        ({"ground_truth": {"target": None}}, "reward_model.ground_truth.target"),
        ({"ground_truth": {"target": "gold"}}, "reward_model.ground_truth.target"),
        ({"ground_truth": {"target": [""]}}, "reward_model.ground_truth.target[0]"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_nested_answer_that_is_not_there(tmp_path: Path, reward_model: Any, named: str, suffix: str) -> None:
    rows = [{"question": row["question"], "reward_model": reward_model} for row in good_rows(0)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(whole(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    check(path, "(?:all rows|row 1|line 1)", named)


def test_mixed_schema_in_jsonl_names_the_row_that_differs(tmp_path: Path) -> None:
    rows = good_rows(0)
    rows[5]["answer"] = rows[5].pop("golden_answers")
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole(rows))
    check(path, "line 6", "golden_answers", "is missing")


def test_a_null_struct_in_one_row(tmp_path: Path) -> None:
    rows = [{"question": "q?", "reward_model": {"ground_truth": {"target": ["gold"]}}} for _ in range(4)]
    rows[2]["reward_model"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    check(tmp_path / "a.parquet", "row 3", "reward_model", "is null")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(good_rows(0))
    table = table.append_column("question", table.column("id"))
    pq.write_table(table, tmp_path / "a.parquet")
    check(tmp_path / "a.parquet", "all rows", "question", "2 columns share this name")


def test_zero_rows_of_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(good_rows(0)).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: holds 0 rows"):
        load_questions(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("seed", range(5))
def test_cut_parquet(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(good_rows(seed)), path)
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(4, len(content))])
    with pytest.raises(DataError, match="footer is missing or damaged") as caught:
        load_questions(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_in_are_questions_out(tmp_path: Path) -> None:
    """The unspoiled file loads, so every error above comes from the mutation."""
    for seed in range(10):
        rows = good_rows(seed)
        (tmp_path / "a.jsonl").write_bytes(whole(rows))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
        loaded = load_questions(str(tmp_path / "a.jsonl"))
        assert loaded == load_questions(str(tmp_path / "a.parquet"))
        assert [(q.text, list(q.answers)) for q in loaded] == [(row["question"], row["golden_answers"]) for row in rows]


# Random bytes


def flip(content: bytes, draws: random.Random) -> bytes:
    spoiled = bytearray(content)
    for _ in range(draws.choice([1, 1, 2, 8])):
        place = draws.randrange(len(spoiled))
        match draws.randrange(3):
            case 0:
                spoiled[place] ^= 1 << draws.randrange(8)
            case 1:
                spoiled[place] = draws.randrange(256)
            case _:
                del spoiled[place : place + draws.randrange(1, 20)]
                spoiled = spoiled or bytearray(b"x")
    return bytes(spoiled)


def load_or_one_error(path: Path) -> bool:
    """True if it loads whole. Anything but a DataError about this file is a failure of the test."""
    try:
        return len(load_questions(str(path))) > 0
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < len(str(path)) + 500
        return False


def flip_many(folder: Path, suffix: str, count: int) -> None:
    rows = good_rows(0)
    path = folder / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_bytes(gzip.compress(whole(rows)) if suffix.endswith("gz") else whole(rows))
    content = path.read_bytes()
    outcomes = set()
    for seed in range(count):
        path.write_bytes(flip(content, random.Random(seed)))
        outcomes.add(load_or_one_error(path))
    assert False in outcomes


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_flipped_bytes(tmp_path: Path, suffix: str) -> None:
    flip_many(tmp_path, suffix, 200)


@pytest.mark.full
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_flipped_bytes_many(tmp_path: Path, suffix: str) -> None:
    flip_many(tmp_path, suffix, 3_000)


# Huge files: at most 300 MB of memory and 3 s of processor time, counted in a process of its own

MEASURE = """
import sys, time
from zs_fast.errors import DataError
from zs_fast.search.data import load_questions
start = time.process_time()
try:
    load_questions(sys.argv[1])
    print("loaded")
except DataError as error:
    print(error)
seconds = time.process_time() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024)
"""


def measured(path: Path) -> tuple[str, float, float]:
    """(message, seconds of processor time, peak MiB) of loading `path`."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, env=ENV
    )
    message, numbers = done.stdout.strip().rsplit("\n", 1)
    seconds, mebibytes = map(float, numbers.split())
    return message, seconds, mebibytes


ENV = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)


def gzip_of(path: Path, piece: bytes, count: int) -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("wb") as stream:
        for _ in range(count):
            stream.write(compressor.compress(piece))
        stream.write(compressor.flush())


def huge_cell(path: Path, size: int) -> None:
    rows = good_rows(0)
    rows[4]["question"] = "x" * size
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def sparse_parquet(path: Path, size: int) -> None:
    path.write_bytes(b"PAR1")
    with path.open("r+b") as stream:
        stream.truncate(size)


HUGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "sparse_jsonl": ("a.jsonl", lambda path: sparse(path, 8 << 30), "line 1"),
    "sparse_parquet": ("a.parquet", lambda path: sparse_parquet(path, 8 << 30), "footer"),
    "one_line_of_512_mib": ("a.jsonl.gz", lambda path: gzip_of(path, b"x" * (1 << 20), 512), "line 1"),
    "newlines_of_512_mib": ("a.jsonl.gz", lambda path: gzip_of(path, b"\n" * (1 << 20), 512), "line 1"),
    "cell_of_64_mib": ("a.parquet", lambda path: huge_cell(path, 64 << 20), "question"),
    "cell_of_16_mib": ("a.parquet", lambda path: huge_cell(path, 16 << 20), "row 5"),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("name", HUGE)
def test_huge_files_are_refused_within_bounds(tmp_path: Path, name: str) -> None:
    file_name, make, words = HUGE[name]
    path = tmp_path / file_name
    make(path)
    message, seconds, mebibytes = measured(path)
    assert str(path) in message and words in message
    assert mebibytes <= 300
    assert seconds <= 3
