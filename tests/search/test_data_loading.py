"""Loading questions: every accepted form, the same Question from each, and errors about the source as a whole."""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zs_fast.errors import DataError
from zs_fast.search import data, hub
from zs_fast.search.data import load_questions
from zs_fast.search.reward import normalise
from zs_fast.types import Question

ROWS: list[dict[str, Any]] = [
    {"id": "train_0", "question": "who wrote emma?", "golden_answers": ["Jane Austen", "Austen"], "data_source": "nq"},
    {"id": "train_1", "question": " où est Zürich ", "golden_answers": ["Switzerland", "Suisse"], "data_source": "nq"},
    {"id": "train_0", "question": "is it true?", "golden_answers": ["yes"], "data_source": "hotpotqa"},
]
QUESTIONS = [
    Question(id="nq:train_0", text="who wrote emma?", answers=("Jane Austen", "Austen"), source="nq"),
    Question(id="nq:train_1", text="où est Zürich", answers=("Switzerland", "Suisse"), source="nq"),
    Question(id="hotpotqa:train_0", text="is it true?", answers=("yes",), source="hotpotqa"),
]


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def zerosearch_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row
        | {
            "prompt": [{"content": "Answer the given question.", "role": "user"}],
            "ability": "fact-reasoning",
            "reward_model": {"ground_truth": {"target": row["golden_answers"]}, "style": "rule"},
            "extra_info": {"index": 0, "split": "train"},
            "metadata": None,
        }
        for row in rows
    ]


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in columns} for row in rows]


# One set of questions in every form


def test_jsonl(tmp_path: Path) -> None:
    assert load_questions(write(tmp_path, "a.jsonl", json_lines(ROWS))) == QUESTIONS


def test_jsonl_gz(tmp_path: Path) -> None:
    assert load_questions(write(tmp_path, "a.jsonl.gz", gzip.compress(json_lines(ROWS).encode()))) == QUESTIONS


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.removesuffix("\n"),
        lambda text: text + "\n\n",
        lambda text: text.replace("ü", "\\u00fc"),
        lambda text: text.replace('"id"', '"more": {"deep": [1, null, NaN]}, "id"'),
    ],
    ids=["byte_order_mark", "crlf", "no_final_newline", "empty_lines_at_the_end", "escaped", "extra_column"],
)
def test_jsonl_as_other_programs_write_it(tmp_path: Path, change: Any) -> None:
    assert load_questions(write(tmp_path, "a.jsonl", change(json_lines(ROWS)))) == QUESTIONS


def test_zerosearch_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(zerosearch_rows(ROWS)), tmp_path / "train.parquet")
    assert load_questions(str(tmp_path / "train.parquet")) == QUESTIONS


def test_parquet_in_several_row_groups_keeps_the_order(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"id": str(number), "question": f"q {number}?"} for number in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    assert [question.text for question in load_questions(str(tmp_path / "a.parquet"))] == [
        row["question"] for row in rows
    ]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=["large", "dictionary"]
)
def test_parquet_string_types(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name in ("id", "question", "data_source"):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, table.column(name).cast(kind))
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_questions(str(tmp_path / "a.parquet")) == QUESTIONS


def test_search_r1_parquet_without_golden_answers(tmp_path: Path) -> None:
    rows = without(zerosearch_rows(ROWS), "golden_answers")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_questions(str(tmp_path / "a.parquet")) == QUESTIONS
    assert load_questions(write(tmp_path, "a.jsonl", json_lines(rows))) == QUESTIONS


def test_verl_parquet_with_the_question_in_extra_info(tmp_path: Path) -> None:
    rows = [row | {"extra_info": {"question": row["question"], "index": 0}} for row in zerosearch_rows(ROWS)]
    pq.write_table(pa.Table.from_pylist(without(rows, "question", "golden_answers")), tmp_path / "a.parquet")
    assert load_questions(str(tmp_path / "a.parquet")) == QUESTIONS


@pytest.mark.parametrize("name", ["answer", "answers"])
@pytest.mark.parametrize("as_list", [False, True])
def test_answer_columns_of_other_sets(tmp_path: Path, name: str, as_list: bool) -> None:
    rows = [
        row | {name: row["golden_answers"] if as_list else row["golden_answers"][0]} for row in without(ROWS, "nothing")
    ]
    loaded = load_questions(write(tmp_path, "a.jsonl", json_lines(without(rows, "golden_answers"))))
    assert [question.answers[0] for question in loaded] == ["Jane Austen", "Switzerland", "yes"]


def test_golden_answers_win_over_the_other_columns(tmp_path: Path) -> None:
    rows = [
        row | {"answer": "wrong", "answers": ["wrong"], "reward_model": {"ground_truth": {"target": ["wrong"]}}}
        for row in ROWS
    ]
    assert load_questions(write(tmp_path, "a.jsonl", json_lines(rows))) == QUESTIONS


@pytest.mark.parametrize("split", ["", ":train", ":test"])
def test_save_to_disk_folder(tmp_path: Path, split: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(zerosearch_rows(ROWS))
    datasets.DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / "set"))
    assert load_questions(str(tmp_path / "set") + split) == QUESTIONS
    if not split:
        table.save_to_disk(str(tmp_path / "single"))
        assert load_questions(str(tmp_path / "single")) == QUESTIONS


def test_shuffled_dataset_is_read_in_its_own_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).select([2, 0, 1]).save_to_disk(str(tmp_path / "set"))
    assert load_questions(str(tmp_path / "set")) == [QUESTIONS[2], QUESTIONS[0], QUESTIONS[1]]


def shard(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        content = json_lines(rows).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)


@pytest.mark.parametrize("place", ["", "data/"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz"])
def test_data_set_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, suffix: str) -> None:
    """Shards by number, splits by name; what else lies there is neither run nor read, and `datasets` isn't needed."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    shard(tmp_path, f"{place}train-00001-of-00002.{suffix}", ROWS[2:])
    shard(tmp_path, f"{place}train-00000-of-00002.{suffix}", ROWS[:2])
    shard(tmp_path, f"{place}test.{suffix}", ROWS[:1])
    shard(tmp_path, f"{place}dev-00000-of-00001-0a1b2c.{suffix}", ROWS[1:])
    write(tmp_path, f"{place}.train.jsonl", "not data")
    write(tmp_path, f"{tmp_path.name}.py", "raise SystemExit('a loading script was run')")
    write(tmp_path, "README.md", "---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n")
    assert load_questions(str(tmp_path)) == load_questions(f"{tmp_path}:train") == QUESTIONS
    assert load_questions(f"{tmp_path}:test") == QUESTIONS[:1]
    assert load_questions(f"{tmp_path}:dev") == QUESTIONS[1:]
    with pytest.raises(DataError, match=r"has no split 'validation'. There is dev, test, train; name one as :split"):
        load_questions(f"{tmp_path}:validation")


def test_repository_rows_without_source_and_id_count_over_all_shards(tmp_path: Path) -> None:
    rows = [row | {"golden_answers": ["2001-01-01"]} for row in without(ROWS, "id", "data_source")]
    for number in range(3):
        shard(tmp_path, f"nq/train-{number:05}-of-00003.jsonl", rows[number : number + 1])
    questions = load_questions(str(tmp_path / "nq"))
    assert [question.id for question in questions] == ["nq:1", "nq:2", "nq:3"]
    assert {question.answers for question in questions} == {("2001-01-01",)}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_bad_row_of_a_repository_names_its_shard(tmp_path: Path, suffix: str) -> None:
    shard(tmp_path, f"data/train-00000-of-00002.{suffix}", ROWS[:2])
    shard(tmp_path, f"data/train-00001-of-00002.{suffix}", [ROWS[2], ROWS[2] | {"id": "b", "question": None}])
    with pytest.raises(
        DataError, match=rf"data, train-00001-of-00002.{suffix}, (row|line) 2, field 'question': is null"
    ):
        load_questions(str(tmp_path))
    shard(tmp_path, f"data/train-00001-of-00002.{suffix}", ROWS[:1])
    with pytest.raises(DataError, match=rf"is a duplicate of train-00000-of-00002.{suffix}, (row|line) 1 "):
        load_questions(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.jsonl"],
        ["train-00000-of-00001.jsonl", "train-00000-of-00001-0a.jsonl"],
        ["train.jsonl", "train.parquet"],
        ["train.jsonl", "train-00000-of-00001.jsonl"],
        ["train-00000-of-99999999999.jsonl"],
    ],
)
def test_a_split_that_is_not_whole(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        shard(tmp_path, name, ROWS)
    with pytest.raises(DataError, match=r"'train' must be one file, or all shards .*There is train"):
        load_questions(str(tmp_path))


def test_a_repository_of_several_sets_asks_for_one(tmp_path: Path) -> None:
    for name in ("nq", "hotpotqa"):
        shard(tmp_path, f"{name}/train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"the folders in it: hotpotqa, nq\."):
        load_questions(str(tmp_path))
    assert load_questions(f"{tmp_path}/nq:train") == QUESTIONS


def test_hub_id_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> Any:
        calls.append(arguments)
        return datasets.DatasetDict(dev=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(hub, "_ask_hub", lambda identifier: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_questions("owner/name/nq:dev") == QUESTIONS
    assert calls == [("owner/name", "nq")]
    with pytest.raises(DataError, match=r"has no split 'train'. There is dev"):
        load_questions("owner/name/nq")


# Ids and sources


def test_ids_of_merged_sets_that_both_count_from_zero_differ(tmp_path: Path) -> None:
    """NQ and HotpotQA both hold a train_0 with extra_info.index 0; they must not share a group or a seed."""
    pq.write_table(pa.Table.from_pylist(zerosearch_rows(ROWS)), tmp_path / "a.parquet")
    ids = [question.id for question in load_questions(str(tmp_path / "a.parquet"))]
    assert len(set(ids)) == 3 and {"nq:train_0", "hotpotqa:train_0"} < set(ids)


def test_rows_without_ids_are_numbered(tmp_path: Path) -> None:
    loaded = load_questions(write(tmp_path, "a.jsonl", json_lines(without(ROWS, "id"))))
    assert [question.id for question in loaded] == ["nq:1", "nq:2", "hotpotqa:3"]


def test_rows_without_a_source_take_the_file_name(tmp_path: Path) -> None:
    rows = [row | {"id": number} for number, row in enumerate(without(ROWS, "data_source"))]
    loaded = load_questions(write(tmp_path, "my_set.test.jsonl", json_lines(rows)))
    assert [(question.id, question.source) for question in loaded] == [(f"my_set:{n}", "my_set") for n in range(3)]


def test_answers_that_can_never_match_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [ROWS[0], ROWS[1] | {"golden_answers": ["$", "United States dollar", "The"]}]
    path = write(tmp_path, "a.jsonl", json_lines(rows))
    with caplog.at_level(logging.WARNING):
        loaded = load_questions(path)
    assert loaded[1].answers == ("United States dollar",)
    assert len(caplog.records) == 1
    assert all(part in caplog.text for part in (path, "2 accepted answers", "line 2", "'$'"))


# Errors about the source


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"question,answer\n", "'.csv'"),
        ("a.json", b"[]", "'.json'"),
        ("noname", b"{}", "no known format"),
        ("a.jsonl", b"", "0 rows"),
        ("a.jsonl", b"\n\n", "0 rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "0 rows"),
        ("a.jsonl.gz", b"{}", "isn't gzip"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "rename it to a.jsonl.gz"),
        ("a.jsonl", b"PAR1....", "content is parquet"),
        ("a.parquet", b"", "doesn't start as parquet does"),
        ("a.parquet", b'{"question": "q"}', "rename it to end in .jsonl"),
        ("a.parquet", b"PAR1" + bytes(100), "cut short"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_questions(path)
    assert path in str(caught.value) and words.lower() in str(caught.value).lower()
    assert caught.value.exit_code == 2


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", json_lines(ROWS))
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean train.jsonl\?\)"):
        load_questions(str(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    "spec", ["", "  ", "quickstart:dev", "a\0b", "/", "/dev/null", "x" * 5000, "~nobody-here/x", "../nowhere/x/y/z"]
)
def test_specs_that_name_nothing(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        load_questions(spec)
    assert "save_to_disk" in str(caught.value) and len(str(caught.value)) < 600


def test_folder_that_no_one_saved(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"without dataset_info.json"):
        load_questions(str(tmp_path))


@pytest.mark.parametrize("damage", ["state.json", "data-00000-of-00001.arrow", "dataset_info.json"])
def test_damaged_folder(tmp_path: Path, damage: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set" / damage).write_bytes(b"{")
    with pytest.raises(DataError, match="set: the folder is damaged"):
        load_questions(str(tmp_path / "set"))


def test_folder_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "dataset_info.json", "{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in (str(tmp_path), "owner/name:train"):
        with pytest.raises(DataError, match="pip install datasets"):
            load_questions(spec)


def test_parquet_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs the package pyarrow"):
        load_questions(path)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")

    def no_network(identifier: str) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "_ask_hub", no_network)
    with pytest.raises(DataError, match=r"owner/name: .*Name or service not known.*Check the name and the network"):
        load_questions("owner/name")


# The data that ships with the quickstart, and real public data where it is at hand


@pytest.mark.parametrize("spec", data.QUICKSTART)
def test_quickstart_questions(spec: str) -> None:
    if not data.WORLD_FOLDER.is_dir():
        pytest.skip(f"{data.WORLD_FOLDER} is not there yet")
    questions = load_questions(spec)
    assert questions and len({question.id for question in questions}) == len(questions)


def real_data() -> Path:
    found = os.environ.get("ZS_FAST_DATA")
    return Path(found) if found else Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(("name", "rows"), [("train", 500), ("test", 200)])
def test_real_zerosearch_parquet(name: str, rows: int) -> None:
    path = real_data() / "zerosearch_format" / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set ZS_FAST_DATA to the folder that holds zerosearch_format/")
    questions = load_questions(str(path))
    table = pq.read_table(path).to_pylist()
    assert len(questions) == rows
    for question, row in zip(questions, table, strict=True):
        assert question.text == row["question"].strip()
        assert list(question.answers) == row["golden_answers"] == row["reward_model"]["ground_truth"]["target"]
        assert question.id == f"{row['data_source']}:{row['id']}" and question.source == row["data_source"]


def test_real_flashrag_jsonl() -> None:
    paths = sorted((real_data() / "qa").glob("*.jsonl.gz"))
    if not paths:
        pytest.skip(f"{real_data() / 'qa'} holds no .jsonl.gz; set ZS_FAST_DATA to the folder that holds qa/")
    for path in paths:
        questions = load_questions(str(path))
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            assert len(questions) == sum(1 for _ in stream)
        assert len({question.id for question in questions}) == len(questions)
        assert all(normalise(answer) for question in questions for answer in question.answers)
