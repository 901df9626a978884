"""Replies that were got are kept through a kill at any instant, and none is asked for twice."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from zs_fast.recipe_files import load_recipe
from zs_fast.rollout.journal import JournalKey
from zs_fast.rollout.play import Player
from zs_fast.system.files import FileOperations
from zs_fast.system.journal import RunJournal, frames
from zs_fast.train import train
from zs_fast.types import Completion, FinishReason, Question, Role, SearchMode, SearchRequest, SearchResult

pytestmark = pytest.mark.usefixtures("no_pictures")

QUESTION = Question(id="q\ud800", text="who?", answers=("a", "b"), source="s")
CONTEXT = [1, 2, 3]


class NoSync(FileOperations):
    """Thousands of files are opened here, and nobody cuts the power."""

    def fsync(self, descriptor: int) -> None:
        pass


def journal_in(folder: Path, run: str = "run", **options) -> RunJournal:
    return RunJournal(folder, run=run, **{"warn": pytest.fail, "files": NoSync()} | options)


def completion(number: int, reason: FinishReason = FinishReason.STOP) -> Completion:
    logprobs = (-0.1 * number, float("-inf"), -1e-300)
    return Completion(
        request_id=0, role=Role.POLICY, token_ids=(number, 0, 151_935), logprobs=logprobs, finish_reason=reason
    )


def key(number: int, role: Role = Role.POLICY) -> JournalKey:
    return JournalKey(3, QUESTION.id, number, 0, role)


def result(number: int, *, failed: bool = False) -> SearchResult:
    request = SearchRequest(step=3, question=QUESTION, sample=number, turn=0, query="x", noise_probability=1 / 3)
    return SearchResult(request=request, documents=("d\x00\ud800",), mode=SearchMode.NOISY, failed=failed)


def fill(journal: RunJournal, numbers=range(4)) -> None:
    for number in numbers:
        journal.record(key(number), CONTEXT, completion(number))
        journal.record_search(key(number, Role.SIMULATOR), result(number))


def found(journal: RunJournal) -> list[int]:
    """Numbers of the replies that are found, each whole."""
    numbers = []
    for number in range(4):
        if (reply := journal.lookup(key(number), CONTEXT)) is not None:
            assert reply == completion(number)
            numbers.append(number)
        search = journal.lookup_search(key(number, Role.SIMULATOR), result(number).request)
        if search is not None:
            assert search == result(number)
            numbers.append(number + 10)
    return numbers


ALL = [0, 10, 1, 11, 2, 12, 3, 13]


def test_replies_come_back_equal_and_only_for_what_was_asked(tmp_path):
    journal = journal_in(tmp_path)
    with journal.scope("rollout_3"):
        fill(journal)
        journal.keep_outcome({"all": [1.5, None]})
    with journal.scope("rollout_4"):
        assert found(journal) == [] and journal.searches() == [] and journal.outcome() is None
    with journal.scope("rollout_3"):
        assert found(journal) == ALL and journal.outcome() == {"all": [1.5, None]}
        assert journal.searches() == [result(number) for number in range(4)]
        assert journal.lookup(key(0), [1, 2, 4]) is None, "sampled from another context"
        assert journal.lookup_search(key(0, Role.SIMULATOR), result(1).request) is None
    assert journal.lookup(key(0), CONTEXT) is None, "no scope is open"


def test_of_an_exact_engine_only_whole_trajectories_are_replayed(tmp_path):
    for exact, expected in ((True, [10, 1, 11]), (False, [0, 10, 1, 11])):
        with (journal := journal_in(tmp_path, exact=exact)).scope("rollout_3"):
            fill(journal, [0, 1])
            journal.record_end(key(1))
        with (journal := journal_in(tmp_path, exact=exact)).scope("rollout_3"):
            assert found(journal) == expected


def test_failed_replies_are_asked_for_again(tmp_path):
    journal = journal_in(tmp_path)
    with journal.scope("rollout_3"):
        journal.record(key(0), CONTEXT, completion(0, FinishReason.FAILED))
        journal.record_search(key(0, Role.SIMULATOR), result(0, failed=True))
    with journal.scope("rollout_3"):
        assert found(journal) == []


def test_the_replies_of_another_run_are_not_used_and_go(tmp_path):
    with (journal := journal_in(tmp_path)).scope("rollout_3"):
        fill(journal)
    with (journal := journal_in(tmp_path, run="other")).scope("rollout_3"):
        assert found(journal) == []
        fill(journal, [2])
    with (journal := journal_in(tmp_path, run="other")).scope("rollout_3"):
        assert found(journal) == [2, 12]


def test_every_torn_tail_is_cut_off_and_written_on(tmp_path):
    whole = tmp_path / "whole"
    with (journal := journal_in(whole)).scope("rollout_3"):
        fill(journal)
    content = (whole / "rollout_3.0").read_bytes()
    ends = [end for _, _, end in frames(whole / "rollout_3.0")]
    assert ends[-1] == len(content)
    for size in range(len(content)):
        torn = tmp_path / "torn"
        torn.mkdir(exist_ok=True)
        (torn / "rollout_3.0").write_bytes(content[:size])
        kept = max(0, sum(end <= size for end in ends) - 1)
        with (journal := journal_in(torn)).scope("rollout_3"):
            assert found(journal) == ALL[:kept]
            fill(journal, range(kept // 2, 4))
        with (journal := journal_in(torn)).scope("rollout_3"):
            assert found(journal) == ALL


def test_a_changed_byte_ends_the_file_there(tmp_path):
    with (journal := journal_in(tmp_path)).scope("rollout_3"):
        fill(journal)
    content = (tmp_path / "rollout_3.0").read_bytes()
    ends = [end for _, _, end in frames(tmp_path / "rollout_3.0")]
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (tmp_path / "rollout_3.0").write_bytes(changed)
        with (journal := journal_in(tmp_path)).scope("rollout_3"):
            assert found(journal) == ALL[: max(0, sum(end <= place for end in ends) - 1)]


def test_ranks_find_each_others_replies(tmp_path):
    for rank in (0, 1):
        with (journal := journal_in(tmp_path, rank=rank)).scope("rollout_3"):
            fill(journal, [rank])
    with (journal := journal_in(tmp_path)).scope("rollout_3"):
        assert found(journal) == [0, 10, 1, 11]


def test_covered_scopes_are_removed_and_nothing_else(tmp_path):
    journal = journal_in(tmp_path)
    for name in ("rollout_9", "rollout_10", "rollout_11", "evaluation_10_bm25", "evaluation_11_closed_book"):
        with journal.scope(name):
            fill(journal)
    (tmp_path / "notes.txt").write_text("mine")
    journal.forget(rollouts=10, evaluations=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation_11_closed_book.0", "notes.txt", "rollout_11.0",
    ]  # fmt: skip


@pytest.mark.parametrize("operation", ["open", "write", "fsync"])
def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path, operation):
    class Full(FileOperations):
        pass

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files, told = Full(), []
    setattr(files, operation, fail)
    with (journal := journal_in(tmp_path, warn=told.append, files=files)).scope("rollout_3"):
        fill(journal)
    assert len(told) == 1 and "No space left" in told[0] and str(tmp_path) in told[0]


# Whole runs: two models in one engine, killed in the middle of a step.

STEPS = 3


def small_run(output: Path, **overrides: object):
    small = {
        "output": output,
        "train.steps": STEPS,
        "train.questions_per_step": 2,
        "train.group_size": 2,
        "train.learning_rate": 1e-3,
        "train.save_every": 0,
        "eval.questions": 2,
        "eval.at_start": "false",
        "eval.search": "bm25",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


SHARED = {"simulator.share_noise_in_group": "true"}
EARLY = {"train.max_staleness": 1, "algorithm.correction": "token", "engine.slots": 4}
KINDS = {"plain": {}, "shared replies": SHARED, "begun early": SHARED | EARLY}
IN_CI = "shared replies"


@pytest.fixture(scope="module", params=[k if k == IN_CI else pytest.param(k, marks=pytest.mark.full) for k in KINDS])
def whole_run(request, tmp_path_factory) -> tuple[Path, dict[str, object]]:
    output = tmp_path_factory.mktemp("journalled") / "whole"
    train(small_run(output, **KINDS[request.param]))
    return output, KINDS[request.param]


def killed_after(rounds: int, output: Path, options: dict[str, object], calls: Path, *, resume: bool) -> bool:
    """Play on in a child that kills itself after this many rounds of all players; did it come that far?"""
    child = os.fork()
    if child == 0:
        try:
            real, recorded, left = Player._play_on, RunJournal._append, iter(range(rounds))
            log = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

            def play_on(player: Player) -> bool:
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(player)

            def append(journal: RunJournal, head: dict, body: bytes = b"") -> None:
                recorded(journal, head, body)
                name = head.get("completion") or head.get("search")
                if name:
                    os.write(log, (json.dumps([journal._path.name, name]) + "\n").encode())

            Player._play_on, RunJournal._append = play_on, append
            train(small_run(output, **options), resume=resume)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def same_end(run: Path, whole: Path) -> None:
    last = f"checkpoints/step_{STEPS}"
    for name in ("metrics.jsonl", "rollouts.jsonl", f"{last}/model/model.safetensors", f"{last}/trainer.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert list((run / "journal").iterdir()) == [], "the last checkpoint covers all"


def test_a_run_killed_again_and_again_ends_in_the_same_bytes_and_repeats_no_reply(whole_run, tmp_path):
    """There is no checkpoint before the last step: all that the journal did not hold would be played again."""
    whole, options = whole_run
    run, calls, kills = tmp_path / "run", tmp_path / "calls", 0
    for rounds in (60, 130, 300, 10**9):
        kills += killed_after(rounds, run, options, calls, resume=kills > 0)
    assert kills >= 2
    same_end(run, whole)
    searches = [line for line in calls.read_text().splitlines() if Role.SIMULATOR in line]
    if "train.max_staleness" not in options:  # there, a local engine's unfinished step is played from its start
        assert len(searches) == len(set(searches)) > 0


def test_a_start_over_uses_no_earlier_reply(tmp_path):
    run, calls = tmp_path / "run", tmp_path / "calls"
    assert killed_after(100, run, {}, calls, resume=False)
    kept = len(list((run / "journal").iterdir()))
    assert kept and killed_after(1, run, {}, calls, resume=False)
    assert [path.name for path in (run / "journal").iterdir()] == ["rollout_1.0"]
    assert len(list(frames(run / "journal" / "rollout_1.0"))) == 1, "its head alone"


def test_without_a_journal_nothing_is_kept(tmp_path):
    assert killed_after(100, tmp_path / "run", {"train.journal": "false"}, tmp_path / "calls", resume=False)
    assert not (tmp_path / "run" / "journal").exists()


def test_a_damaged_journal_costs_replies_and_nothing_else(whole_run, tmp_path):
    whole, options = whole_run
    run, calls = tmp_path / "run", tmp_path / "calls"
    assert killed_after(150, run, options, calls, resume=False)
    for path in (run / "journal").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert not killed_after(10**9, run, options, calls, resume=True)
    same_end(run, whole)
