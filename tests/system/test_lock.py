"""One writer per run folder, and folders that can't be written are refused at once."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from zs_fast.errors import ConfigError, PreflightError
from zs_fast.system.files import FileOperations
from zs_fast.system.lock import check_writable, run_lock

WON, LOST = 10, 11


def contend(folder: Path, start: int, held: int) -> None:
    """In a forked child: wait for the start, try the lock, keep it until the pipe `held` closes."""
    os.read(start, 1)
    try:
        with run_lock(folder):
            os.read(held, 1)
            os._exit(WON)
    except ConfigError:
        os._exit(LOST)


@pytest.mark.parametrize("round_number", range(10))
def test_of_five_simultaneous_starts_exactly_one_wins(tmp_path: Path, round_number: int) -> None:
    start_read, start_write = os.pipe()
    held_read, held_write = os.pipe()
    children = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            os.close(start_write)
            os.close(held_write)
            contend(tmp_path, start_read, held_read)
        children.append(child)
    os.close(start_write)
    outcomes = []
    for _ in range(4):  # the losers end by themselves; the winner waits
        _, status = os.wait()
        outcomes.append(os.waitstatus_to_exitcode(status))
    os.close(held_write)
    outcomes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    os.close(start_read)
    os.close(held_read)
    assert sorted(outcomes) == [WON, LOST, LOST, LOST, LOST]


def test_the_loser_learns_host_and_pid_and_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    ready_read, ready_write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with run_lock(tmp_path):
            os.write(ready_write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready_read, 1)
    with pytest.raises(ConfigError) as caught, run_lock(tmp_path):
        pass
    assert caught.value.exit_code == 2
    assert f"host {socket.gethostname()}, pid {holder}" in str(caught.value) and str(tmp_path) in str(caught.value)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with run_lock(tmp_path):
        assert f"pid {os.getpid()}\n" in (tmp_path / "lock").read_text()
    os.close(ready_read)
    os.close(ready_write)


def test_the_lock_can_be_taken_again_after_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError("a bug")
    with run_lock(tmp_path), pytest.raises(ConfigError), run_lock(tmp_path):
        pass


def test_a_lock_that_can_not_be_opened_is_a_preflight_error(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="--output"), run_lock(tmp_path / "missing"):
        pass


def test_a_good_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(PreflightError, match="--output") as caught:
            check_writable(folder)
        assert str(folder) in str(caught.value)


def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    """As another user, since root may write everywhere."""
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            check_writable(tmp_path / "run")
        except PreflightError:
            os._exit(LOST)
        os._exit(WON)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == LOST


@pytest.mark.parametrize("broken", ["open", "write", "fsync", "close", "rename"])
def test_each_thing_a_checkpoint_needs_is_tried(tmp_path: Path, broken: str) -> None:
    class Broken(FileOperations):
        pass

    def fail(self: FileOperations, *arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    setattr(Broken, broken, fail)
    with pytest.raises(PreflightError, match="Read-only file system"):
        check_writable(tmp_path / "run", files=Broken())
