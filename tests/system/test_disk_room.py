"""Room for a run's checkpoints is looked for before the first rollout, not when the first save fails."""

from __future__ import annotations

import pytest

from tests.faults.toy import toy
from zs_fast.errors import PreflightError
from zs_fast.system import checkpoint
from zs_fast.system.checkpoint import CheckpointStore
from zs_fast.train import train

pytestmark = pytest.mark.usefixtures("no_pictures")

MIB = 2**20


@pytest.fixture
def free(monkeypatch):
    """Says how many bytes the file system has left."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(checkpoint, "free_bytes", lambda path: count)

    return set_free


@pytest.mark.parametrize(
    "keep, saves, needed",
    [(2, 9, 3), (2, 2, 2), (1, 9, 2), (1, 1, 1), (0, 9, 9)],
)
def test_what_is_kept_and_the_one_being_written_must_fit(tmp_path, free, keep, saves, needed):
    store = CheckpointStore(tmp_path, keep)
    free(needed * MIB)
    assert store.check_room(MIB, saves) == ""
    free(needed * MIB - 1)
    if needed <= 2:
        with pytest.raises(
            PreflightError, match=rf"need {needed}\.0 MiB in {tmp_path}.*1024\.0 KiB|2\.0 MiB.*--output"
        ):
            store.check_room(MIB, saves)
    else:
        assert f"need {needed}.0 MiB" in store.check_room(MIB, saves)
    free(min(2, needed) * MIB - 1)
    with pytest.raises(PreflightError, match="keep_checkpoints"):
        store.check_room(MIB, saves)


def test_what_a_resumed_run_has_already_counts(tmp_path, free):
    store = CheckpointStore(tmp_path, 2)
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(MIB))
    free(MIB)
    assert store.check_room(MIB, 9) == ""
    free(MIB - 1)
    assert "need 1.0 MiB" in store.check_room(MIB, 9)


def test_a_run_without_room_is_refused_before_anything_is_played(tmp_path, free, capsys):
    run = tmp_path / "run"
    free(100_000)
    with pytest.raises(PreflightError, match=rf"{run}/checkpoints.*97\.7 KiB are free.*--output") as refused:
        train(toy(run, 1))
    assert refused.value.exit_code == 3
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()


@pytest.mark.parametrize("words", [{}, {"model.lora_rank": 4, "algorithm.name": "ppo"}], ids=["weights", "adapters"])
def test_the_estimate_is_what_a_checkpoint_takes(tmp_path, monkeypatch, words):
    estimates, real = [], CheckpointStore.check_room

    def noted(store, checkpoint_bytes, saves):
        estimates.append((checkpoint_bytes, saves))
        return real(store, checkpoint_bytes, saves)

    monkeypatch.setattr(CheckpointStore, "check_room", noted)
    train(toy(tmp_path / "run", 1, **words))
    folder = tmp_path / "run" / "checkpoints" / "step_1"
    tensors = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    ((estimate, saves),) = estimates
    assert saves == 1 and estimate == pytest.approx(tensors, rel=0.1)
