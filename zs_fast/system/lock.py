"""One writer per run folder, and a folder that can be written, found out before the first rollout."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zs_fast.errors import ConfigError, PreflightError
from zs_fast.system.files import FileOperations, discard, make_durable_directory, replace_file


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `<folder>/lock` for the length of the `with` block; the kernel frees it if the process dies.

    Raises ConfigError, naming host and pid of the holder, when another process has it, and PreflightError when the
    file system knows no locks. A process forked inside the block shares the lock until it ends.
    """
    path = Path(folder) / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PreflightError(f"The lock file {path} can't be opened: {error}. Choose another --output.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 512, 0).decode("utf-8", "replace").strip() or "one that is just starting"
            raise ConfigError(
                f"The run folder {folder} is in use by another process ({holder}). Wait for it, stop it, or choose "
                "another --output."
            ) from error
        except OSError as error:
            raise PreflightError(
                f"{path} can't be locked: {error}. Put the run folder on a file system with locks (a local disk)."
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_writable(folder: Path, *, files: FileOperations | None = None) -> None:
    """Make the run folder and try what a checkpoint needs (write, fsync, rename) in it.

    Raises PreflightError naming the folder when that fails, so that no rollout is lost to a disk that can't be written.
    """
    folder = Path(folder)
    probe = folder / f".probe-{os.getpid()}"
    operations = files or FileOperations()
    try:
        make_durable_directory(operations, folder)
        replace_file(operations, probe, b"probe\n")
        operations.unlink(probe)
    except OSError as error:
        discard(operations, probe)
        raise PreflightError(
            f"The run folder {folder} can't be written: {error}. Mend that, or choose another place with --output."
        ) from error
