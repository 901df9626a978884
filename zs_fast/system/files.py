"""Durable file writing: every change to the disk goes through one small object, so that tests can break each of them.

A file is durable once its bytes are synced *and* the directory that names it is synced. A rename is atomic: a reader
sees the old name or the new one. Nothing here retries: after a failed fsync the kernel may have dropped the pages, so
the attempt is over.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class FileOperations:
    """The calls that change the disk. A test replaces this object by one that counts, fails or dies at call k."""

    def make_directory(self, path: Path) -> None:
        os.mkdir(path)

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """The number of bytes taken, which may be fewer than offered."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        os.rmdir(path)

    def save_tensors(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(tensors), path)


def write_file(files: FileOperations, path: Path, data: bytes) -> None:
    """A new file with these bytes, synced. Its name is durable only after `sync_directory` of its folder."""
    descriptor = files.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        rest = memoryview(data)
        while rest:
            taken = files.write(descriptor, rest)
            if taken <= 0:
                raise OSError(f"the system took 0 of {len(rest)} bytes for {path}")
            rest = rest[taken:]
        files.fsync(descriptor)
    finally:
        files.close(descriptor)


def sync_path(files: FileOperations, path: Path) -> None:
    """The bytes of an existing file, or the names in an existing directory, are on the disk."""
    descriptor = files.open(path, os.O_RDONLY)
    try:
        files.fsync(descriptor)
    finally:
        files.close(descriptor)


def make_durable_directory(files: FileOperations, path: Path) -> None:
    """The directory exists and its name is on the disk; nothing is done where it exists already."""
    if path.is_dir():
        return
    make_durable_directory(files, path.parent)
    try:
        files.make_directory(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_path(files, path.parent)


def replace_file(files: FileOperations, path: Path, data: bytes) -> None:
    """The file holds these bytes, or, after a crash at any instant, what it held before."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        write_file(files, temporary, data)
        files.rename(temporary, path)
    except BaseException:
        discard(files, temporary)
        raise
    sync_path(files, path.parent)


def remove_tree(files: FileOperations, path: Path) -> None:
    """The path and all below it are gone. Links are removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove_tree(files, child)
        files.remove_directory(path)
    else:
        files.unlink(path)


def discard(files: FileOperations, path: Path) -> None:
    """Like `remove_tree`, but what can't be removed stays: for leftovers that the next start removes anyway."""
    try:
        if os.path.lexists(path):
            remove_tree(files, path)
    except OSError:
        pass


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write to the file system of the nearest existing parent of `path`."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def format_bytes(count: int) -> str:
    """`1536` -> `1.5 KiB`."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


_MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "*.safetensors", "*.gguf")
_END_BYTES = 2**20
"""Of a large file this much is read at its start and at its end."""


def files_digest(path: Path) -> str:
    """Tells a model folder or a file from a changed one, by names, sizes and the first and last MiB of each file."""
    digest = hashlib.sha256()
    files = sorted(file for pattern in _MODEL_FILES for file in path.glob(pattern)) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_END_BYTES))
            content.seek(max(0, size - _END_BYTES))
            digest.update(content.read(_END_BYTES))
    return digest.hexdigest()[:16]
