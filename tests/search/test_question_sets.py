"""Several sets of questions judged together: their names, their ids, and passages of their own."""

from __future__ import annotations

import gzip
import json

import pytest

from zs_fast.errors import ConfigError, DataError
from zs_fast.search.by_set import SearchBySet, load_sets, set_name
from zs_fast.testing import ScriptedSearch
from zs_fast.types import Question, SearchRequest


def write(path, count: int, source: str) -> str:
    rows = [
        {"id": f"{n}", "question": f"q {n}", "golden_answers": ["emma"], "data_source": source} for n in range(count)
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


def test_names(tmp_path):
    path = write(tmp_path / "nq.test.jsonl.gz", 1, "nq")
    assert set_name(path) == "nq" and set_name("quickstart:heldout") == "heldout"
    assert set_name("owner/my.name:dev") == "my_name_dev" and set_name("some/folder/") == "folder"
    assert "/" not in set_name("a/../..") and set_name("é:ü") == "é_ü"


def test_all_rows_or_the_first_of_each_in_one_order(tmp_path):
    specs = [write(tmp_path / "nq.test.jsonl.gz", 30, "nq"), write(tmp_path / "pop.jsonl.gz", 7, "popqa")]
    whole = load_sets(specs, first=0, seed=3)
    assert {name: len(questions) for name, questions in whole.items()} == {"nq": 30, "pop": 7}
    some = load_sets(specs, first=10, seed=3)
    assert some == {name: questions[:10] for name, questions in whole.items()}
    assert load_sets(specs, first=10, seed=4) != some


def test_two_sets_of_one_name_or_one_id(tmp_path):
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "nq.test.jsonl.gz", 3, "nq")
    with pytest.raises(ConfigError, match=r"two sets that are called 'nq'"):
        load_sets([first, write(tmp_path / "b" / "nq.dev.jsonl.gz", 3, "other")], first=0, seed=0)
    with pytest.raises(DataError, match=r"'nq:\d' is in two sets of eval.data, nq and more"):
        load_sets([first, write(tmp_path / "more.jsonl.gz", 2, "nq")], first=0, seed=0)


def request(id_: str) -> SearchRequest:
    question = Question(id=id_, text="?", answers=("a",), source="s")
    return SearchRequest(step=0, question=question, sample=0, turn=0, query="x", noise_probability=0.0)


def test_each_search_goes_to_its_own_sets_passages():
    requests = [request(id_) for id_ in ("b", "a", "c")]
    sets = {"one": [requests[1].question], "two": [requests[0].question, requests[2].question]}
    backends = {name: ScriptedSearch(lambda request, name=name: [f"{name} {request.question.id}"]) for name in sets}
    search = SearchBySet(backends, sets)
    for one in requests:
        search.submit(one)
    assert {r.request.question.id: r.documents[0] for r in search.poll()} == {"a": "one a", "b": "two b", "c": "two c"}
    assert not search.poll()
    search.submit(requests[0])
    search.cancel()
    assert not search.poll()
