"""What a checkpoint store gives back, what it refuses, and what it keeps."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as serialise

from zs_fast.config import RunConfig
from zs_fast.errors import CheckpointError, CheckpointUnusableError
from zs_fast.system import checkpoint as checkpoint_module
from zs_fast.system.checkpoint import CheckpointStore, check_same_run, fault
from zs_fast.system.files import FileOperations

TENSORS = {
    "float32": torch.tensor([0.1, -0.0, float("inf"), float("nan")]),
    "bfloat16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) / 7,
    "int64": torch.tensor([2**62 + 1, -5]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.25, dtype=torch.float64),
}


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "nested").mkdir()
    (folder / "nested" / "model.safetensors").write_bytes(bytes(range(256)) * 40)


def saved(root: Path, *steps: int, keep: int = 0) -> CheckpointStore:
    store = CheckpointStore(root, keep)
    for step in steps:
        store.save(step, write_model=write_model, tensors=TENSORS, state={"step": step, "third": 1 / 3})
        assert store.warnings == []
    return store


def steps_on_disk(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in store.folder.iterdir())


def test_tensors_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "step": 7,
        "rate": 0.1 + 0.2,
        "tiny": 5e-324,
        "text": "Zoë \U0001f600 \u2028 \x00",
        "none": None,
        "deep": [[1], {}],
    }
    store = CheckpointStore(tmp_path, 0)
    returned = store.save(7, write_model=write_model, tensors=TENSORS, state=state)
    newest = CheckpointStore(tmp_path, 0).newest()
    assert newest == returned and newest is not None
    assert newest.step == 7 and newest.state == state
    loaded = newest.tensors()
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert serialise({"x": loaded[name]}) == serialise({"x": tensor})
    assert (newest.model_path / "nested" / "model.safetensors").stat().st_size == 256 * 40
    assert (tmp_path / "latest").read_text() == "checkpoints/step_7\n"


def test_tensors_that_are_views_or_need_gradients_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0, requires_grad=True)
    transposed = base.reshape(3, 4).T
    store = CheckpointStore(tmp_path, 0)
    checkpoint = store.save(1, write_model=write_model, tensors={"transposed": transposed}, state={})
    assert torch.equal(checkpoint.tensors()["transposed"], transposed)


def test_no_checkpoint_is_none_and_not_an_error(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, 2).newest() is None
    assert CheckpointStore(tmp_path / "missing", 2).newest() is None


def test_newest_goes_by_number_not_by_name_time_or_hint(tmp_path: Path) -> None:
    store = saved(tmp_path, 100, 9, 20)
    (tmp_path / "latest").write_text("checkpoints/step_9\n")
    newest = store.newest()
    assert newest is not None and newest.step == 100


@pytest.mark.parametrize("keep, expected", [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (3, [2, 3, 4])])
def test_retention_keeps_the_newest(tmp_path: Path, keep: int, expected: list[int]) -> None:
    assert steps_on_disk(saved(tmp_path, 1, 2, 3, 4, keep=keep)) == expected


def test_retention_never_counts_a_damaged_checkpoint(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    (store.folder / "step_3" / "trainer.json").write_text("{}")
    store = saved(tmp_path, 4, keep=2)
    assert steps_on_disk(store) == [2, 4]


def test_saves_that_fail_never_lose_the_last_good_one(tmp_path: Path) -> None:
    """Any pattern of failing saves and restarts: one verified checkpoint at least, at most keep + 1 on disk."""

    def broken_model(folder: Path) -> None:
        write_model(folder)
        raise OSError(28, "No space left on device")

    for seed in range(6):
        draws = random.Random(seed)
        root = tmp_path / str(seed)
        keep = 1 + seed % 3
        store = saved(root, 1, keep=keep)
        good = 1
        for step in range(2, 12):
            if draws.random() < 0.4:
                store = CheckpointStore(root, keep)
            if draws.random() < 0.5:
                with pytest.raises(CheckpointError, match="No space left on device"):
                    store.save(step, write_model=broken_model, tensors=TENSORS, state={})
            else:
                store.save(step, write_model=write_model, tensors=TENSORS, state={})
                good = step
            newest = store.newest()
            assert newest is not None and newest.step == good
            assert len(list(store.folder.iterdir())) <= keep


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    store = saved(tmp_path, 5, 5, keep=1)
    assert steps_on_disk(store) == [5] and fault(store.folder / "step_5", 5) == ""


def test_a_callback_that_breaks_leaves_nothing_and_its_own_error(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)

    def broken(folder: Path) -> None:
        write_model(folder)
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        store.save(2, write_model=broken, tensors=TENSORS, state={})
    assert [path.name for path in store.folder.iterdir()] == ["step_1"]


def test_state_that_is_not_json_is_refused_before_the_disk_is_touched(tmp_path: Path) -> None:
    for state in ({"loss": float("nan")}, {"object": object()}):
        with pytest.raises((ValueError, TypeError)):
            CheckpointStore(tmp_path, 0).save(1, write_model=write_model, tensors={}, state=state)
    assert CheckpointStore(tmp_path, 0).newest() is None
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_file_that_is_written_wrong_is_noticed_before_it_counts(tmp_path: Path) -> None:
    """The disk keeps other bytes than were hashed: the save fails, and the old one stays."""
    store = saved(tmp_path, 1)

    class LyingDisk(FileOperations):
        def rename(self, source: Path, target: Path) -> None:
            raise AssertionError("renamed although it does not verify")

        def fsync(self, descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.name == "manifest.json":
                victim = path.parent / "trainer.safetensors"
                data = bytearray(victim.read_bytes())
                data[-1] ^= 1
                victim.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"does not read back as written: trainer\.safetensors"):
        CheckpointStore(tmp_path, 0, files=LyingDisk()).save(2, write_model=write_model, tensors=TENSORS, state={})
    newest = store.newest()
    assert newest is not None and newest.step == 1
    assert [path.name for path in store.folder.iterdir()] == ["step_1"]


def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    (store.folder / "step_2" / "model" / "config.json").unlink()
    newest = store.newest()
    assert newest is not None and newest.step == 1
    assert len(store.warnings) == 1 and "step_2: model/config.json is missing" in store.warnings[0]


def test_none_usable_names_each_and_why(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    (store.folder / "step_1" / "manifest.json").unlink()
    (store.folder / "step_2" / "trainer.json").write_text("x")
    (store.folder / "step_3").write_text("not a directory")
    with pytest.raises(CheckpointUnusableError) as caught:
        store.newest()
    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert "step_1: manifest.json is missing" in message
    assert "step_2: trainer.json has 1 bytes" in message
    assert "step_3: it is not a directory" in message


def test_bit_flips_are_found(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    flip_bits(store, 200, seed=0)


@pytest.mark.full
def test_many_bit_flips_are_found(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    flip_bits(store, 5000, seed=1)


def flip_bits(store: CheckpointStore, count: int, seed: int) -> None:
    draws = random.Random(seed)
    folder = store.folder / "step_2"
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    for index in range(count):
        path = names[index % len(names)]
        whole = path.read_bytes()
        changed = bytearray(whole)
        bit = draws.randrange(8 * len(whole))
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        newest = store.newest()
        assert newest is not None and newest.step == 1, f"bit {bit} of {path} went unnoticed"
        assert path.relative_to(folder).as_posix() in store.warnings[0]
        path.write_bytes(whole)
    newest = store.newest()
    assert newest is not None and newest.step == 2


def test_truncation_and_growth_are_found_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, 1)
    folder = store.folder / "step_1"

    def opened(path: Path) -> str:
        raise AssertionError(f"{path} was read although a size is wrong")

    monkeypatch.setattr(checkpoint_module, "_sha256", opened)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        whole = path.read_bytes()
        cuts = {0, 1, len(whole) // 2, len(whole) - 1, *range(0, len(whole), 4096)} - {len(whole)}
        for changed in [*(whole[:cut] for cut in cuts), whole + b"\0"]:
            path.write_bytes(changed)
            reason = fault(folder, 1)
            assert path.name in reason and f"has {len(changed)} bytes" in reason
        path.write_bytes(whole)


def test_a_cut_manifest_is_found(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).folder / "step_1"
    whole = (folder / "manifest.json").read_bytes()
    for cut in range(len(whole)):
        (folder / "manifest.json").write_bytes(whole[:cut])
        assert "manifest.json is damaged" in fault(folder, 1)
    (folder / "manifest.json").write_bytes(whole)
    assert fault(folder, 1) == ""


def test_swapped_missing_stale_and_added_files_are_found(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    one, two = store.folder / "step_1", store.folder / "step_2"

    def with_change(change: Any) -> str:
        copy = tmp_path / "copy" / "step_2"
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(two, copy)
        change(copy)
        return fault(copy, 2)

    assert with_change(lambda copy: None) == ""
    # Both states have the same length: only the digest tells.
    assert "trainer.json" in with_change(lambda copy: shutil.copy(one / "trainer.json", copy))
    assert "of step 1" in with_change(lambda copy: shutil.copy(one / "manifest.json", copy))
    assert "extra.json is not in manifest.json" in with_change(lambda copy: (copy / "extra.json").write_text("{}"))
    assert "is missing" in with_change(lambda copy: (copy / "model/nested/model.safetensors").unlink())

    def link(copy: Path) -> None:
        (copy / "trainer.json").unlink()
        (copy / "trainer.json").symlink_to(one / "trainer.json")

    assert "link" in with_change(link)
    assert "link" in with_change(lambda copy: os.mkfifo(copy / "model" / "pipe"))
    assert "of step 2, the directory of step 3" in fault(two, 3)
    store.folder.joinpath("step_9").symlink_to(two, target_is_directory=True)
    newest = store.newest()
    assert newest is not None and newest.step == 2 and "step_9: it is not a directory" in store.warnings[0]


CANARY_NAMES = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "model.ckpt",
    "state.pkl",
    "data.pickle",
    "arrays.npz",
    "cache.joblib",
)


@pytest.mark.parametrize("name", CANARY_NAMES)
def test_pickles_are_neither_written_nor_read(tmp_path: Path, name: str) -> None:
    fired = tmp_path / "fired"
    pickled = f"cposix\nsystem\n(S'touch {fired}'\ntR.".encode()

    def write_pickle(folder: Path) -> None:
        write_model(folder)
        (folder / name).write_bytes(pickled)

    store = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match="pickle"):
        store.save(2, write_model=write_pickle, tensors=TENSORS, state={})
    assert steps_on_disk(store) == [1]
    (store.folder / "step_1" / "model" / name).write_bytes(pickled)
    sign(store.folder / "step_1", 1)
    with pytest.raises(CheckpointUnusableError, match="pickle"):
        store.newest()
    assert not fired.exists()


def sign(folder: Path, step: int) -> None:
    """A manifest that agrees with whatever lies in the folder, as an attacker would write it."""
    entries = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": checkpoint_module._sha256(path),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    content = {"format": checkpoint_module.FORMAT, "step": step, "files": entries}
    (folder / "manifest.json").write_bytes(checkpoint_module._manifest_bytes(content))


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BOMBS = {
    "empty": b"",
    "short": b"\x01\x00",
    "header_2_63": struct.pack("<Q", 2**63) + b"{}",
    "header_1_GiB": struct.pack("<Q", 2**30) + b"{}",
    "not_json": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "deep_json": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "overlap": header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "past_the_end": header({"a": entry(0, 4096, [1024])}, bytes(16)),
    "huge_shape": header({"a": entry(0, 16, [2**40, 2**40])}, bytes(16)),
    "hole": header({"a": entry(8, 16, [2])}, bytes(16)),
    "trailing": header({"a": entry(0, 8, [2])}, bytes(4096)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_hostile_safetensors_are_one_error_and_little_memory(tmp_path: Path, bomb: str) -> None:
    store = saved(tmp_path, 1)
    folder = store.folder / "step_1"
    (folder / "trainer.safetensors").write_bytes(BOMBS[bomb])
    sign(folder, 1)
    checkpoint = store.newest()
    assert checkpoint is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointUnusableError, match=r"trainer\.safetensors"):
        checkpoint.tensors()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("state", [b"", b"[1]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a": 1,}'])
def test_hostile_state_is_skipped_like_a_damaged_checkpoint(tmp_path: Path, state: bytes) -> None:
    store = saved(tmp_path, 1, 2)
    (store.folder / "step_2" / "trainer.json").write_bytes(state)
    sign(store.folder / "step_2", 2)
    newest = store.newest()
    assert newest is not None and newest.step == 1 and "trainer.json" in store.warnings[0]


@pytest.mark.parametrize(
    "manifest",
    [b"", b"null", b"[]", b"{}", b"[" * 200_000, b'{"format": 1}', b"\x00" * 64, b'{"files": {"../../x": {}}}'],
)
def test_hostile_manifests_are_damage(tmp_path: Path, manifest: bytes) -> None:
    folder = saved(tmp_path, 1).folder / "step_1"
    (folder / "manifest.json").write_bytes(manifest)
    assert "manifest.json is damaged" in fault(folder, 1)


@pytest.mark.parametrize("name", ["../step_1/trainer.json", "/etc/passwd", "model/../trainer.json", ""])
def test_a_manifest_can_not_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, 1).folder / "step_1"
    sign(folder, 1)
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    content["files"][name] = {"size": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_bytes(checkpoint_module._manifest_bytes(content))
    assert "is missing" in fault(folder, 1)


def test_another_format_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).folder / "step_1"
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    content["format"] = "zs_fast checkpoint 99"
    (folder / "manifest.json").write_bytes(checkpoint_module._manifest_bytes(content))
    assert "'zs_fast checkpoint 99'" in fault(folder, 1) and "'zs_fast checkpoint 1'" in fault(folder, 1)


def test_clean_up_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (store.folder / ".tmp-2-abc" / "model").mkdir(parents=True)
    (store.folder / ".tmp-2-abc" / "model" / "x").write_text("x")
    (tmp_path / ".tmp-latest-abc").write_text("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (store.folder / ".tmp-link").symlink_to(outside, target_is_directory=True)
    (store.folder / "step_notes").mkdir()
    (tmp_path / "metrics.jsonl").write_text("x")
    CheckpointStore(tmp_path, 1).clean_up()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "latest", "metrics.jsonl", "outside"]
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_1", "step_notes"]
    assert (outside / "precious").exists()


def test_reading_changes_nothing(tmp_path: Path) -> None:
    """A report may look at a run while it saves."""
    store = saved(tmp_path, 1)
    (store.folder / ".tmp-2-live").mkdir()
    CheckpointStore(tmp_path, 1).newest()
    assert (store.folder / ".tmp-2-live").exists()


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    config = RunConfig().model_dump(mode="json")
    for section, values in sections.items():
        config[section] = {**config[section], **values}
    return config


def test_the_same_config_resumes_after_a_round_trip_through_json() -> None:
    saved_config = json.loads(json.dumps(RunConfig().model_dump(mode="json")))
    check_same_run(saved_config, RunConfig().model_dump())


def test_keys_that_do_not_change_the_run_may_differ() -> None:
    current = changed(
        train={"steps": 999, "save_every": 1, "keep_checkpoints": 9, "eval_every": 3},
        log={"tensorboard": True, "rollouts_per_step": 0},
        eval={"temperature": 0.5, "search": ["bm25", "none"]},
    )
    current["output"] = "/elsewhere"
    check_same_run(RunConfig().model_dump(mode="json"), current)


def test_every_other_key_is_refused_with_both_values() -> None:
    """Change each leaf of the config in turn: none is silently accepted."""
    base = RunConfig().model_dump(mode="json")
    refused = 0
    for section, values in base.items():
        for key in values if isinstance(values, dict) else [None]:
            name = section if key is None else f"{section}.{key}"
            covered = section in ("log", "eval", "name", "output") or name in checkpoint_module.MAY_DIFFER
            current = json.loads(json.dumps(base))
            if key is None:
                current[section] = "changed-value"
            else:
                current[section][key] = "changed-value"
            if covered:
                check_same_run(base, current)
                continue
            with pytest.raises(CheckpointUnusableError) as caught:
                check_same_run(base, current)
            before = base[section] if key is None else values[key]
            assert f"{name}: saved {before!r}, now 'changed-value'" in str(caught.value)
            refused += 1
    assert refused > 60


def test_absent_keys_and_own_exceptions_are_told() -> None:
    with pytest.raises(CheckpointUnusableError, match=r"b: saved \(absent\), now 2"):
        check_same_run({"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(CheckpointUnusableError, match=r"x\.y: saved 1, now 2"):
        check_same_run({"x": {"y": 1}}, {"x": {"y": 2}}, {"x.z", "y", "x.y.*"})
    check_same_run({"x": {"y": {"z": 1}}}, {"x": {"y": {"z": 2}}}, {"x.*"})
