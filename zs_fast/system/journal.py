"""Finished replies on disk, so that none is asked for twice after a crash (see `rollout.journal`).

    <run>/journal/rollout_12.0               replies of the twelfth step's rollout, got by rank 0
                  evaluation_12_simulator.0  of an evaluation after twelve finished steps

A file is a row of frames: length and CRC32 of the payload (4 bytes each), then the payload: the length of a JSON head,
the head, and for a completion its ids (int32) and log-probabilities (float64), little endian. The first frame says
which run it belongs to; a file of another one is not used. A frame reaches the operating system before its reply is
used, and the disk within SYNC_EVERY_S; what follows the last whole frame is cut off when the file is opened.

Replies that failed are not kept: after a resume they are asked for again.

A policy's later turns rest on the keys and values of its earlier ones, computed token by token; computed at once, after
a resume, they would differ in the last bits. So for an engine whose samples are the same bits every time (`exact`), the
turns of a trajectory that was not over are sampled again, and the documents come from the journal. For other engines
every turn does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from zs_fast.system.exchange import build, plain
from zs_fast.system.files import FileOperations, make_durable_directory, sync_path
from zs_fast.types import Completion, FinishReason, Role, SearchRequest, SearchResult

SYNC_EVERY_S = 1.0
LONGEST_FRAME_BYTES = 2**30
FRAME = struct.Struct("<II")
HEAD = struct.Struct("<I")
SCOPE_NAME = re.compile(r"(rollout|evaluation)_(\d+)(_\w+)?\.\d+")

Key = tuple[int, str, int, int, str]
"""The fields of a `rollout.journal.JournalKey`."""


class _Reply(NamedTuple):
    context: str
    """Digest of the ids it was sampled from."""
    completion: Completion


class RunJournal:
    """The journal of one process of a run. Files of all ranks are read, its own is written.

    `run`: says which run the replies belong to; others are not used. `exact`: see above. `replays`: are single replies
    looked up? Without it a scope that has no outcome begins anew. `warn` is told once a scope if the disk takes no
    more: the run goes on, and what it asks from then on in that scope is asked again after a crash.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run: str,
        rank: int = 0,
        exact: bool = False,
        replays: bool = True,
        warn: Callable[[str], None],
        files: FileOperations | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._run, self._rank, self._exact, self._replays, self._warn = run, rank, exact, replays, warn
        self._files = files or FileOperations()
        self._descriptor = -1
        self._path = self.folder
        self._synced = 0.0
        self._completions: dict[Key, _Reply] = {}
        self._searches: dict[Key, SearchResult] = {}
        self._over: set[tuple[Any, ...]] = set()
        """(step, question id, sample) of trajectories whose replies are all there."""
        self._outcome: Any = None
        self.num_replayed = 0
        """Replies that were looked up and found, for tests and reports."""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._open(name)
        try:
            yield
        finally:
            self._close()

    def lookup(self, key: Key, context_ids: Sequence[int]) -> Completion | None:
        reply = self._completions.get(_key(key))
        if reply is None or reply.context != _digest(context_ids):
            return None
        if self._exact and tuple(key[:3]) not in self._over:
            return None
        self.num_replayed += 1
        return reply.completion

    def record(self, key: Key, context_ids: Sequence[int], completion: Completion) -> None:
        if completion.finish_reason is FinishReason.FAILED:
            return
        head = {
            "completion": [*_key(key)],
            "context": _digest(context_ids),
            "tokens": len(completion.token_ids),
            "finish_reason": str(completion.finish_reason),
            "policy_version": completion.policy_version,
        }
        ids, logprobs = array("i", completion.token_ids), array("d", completion.logprobs)
        self._append(head, ids.tobytes() + logprobs.tobytes())

    def record_end(self, key: Key) -> None:
        if tuple(key[:3]) not in self._over:
            self._append({"over": [*key[:3]]})

    def lookup_search(self, key: Key, request: SearchRequest) -> SearchResult | None:
        result = self._searches.get(_key(key))
        if result is None or result.request != request:
            return None
        self.num_replayed += 1
        return result

    def record_search(self, key: Key, result: SearchResult) -> None:
        if not result.failed:
            self._append({"search": [*_key(key)], "result": plain(result)})

    def searches(self) -> list[SearchResult]:
        return list(self._searches.values())

    def outcome(self) -> Any:
        return self._outcome

    def keep_outcome(self, value: Any) -> None:
        self._append({"outcome": value})

    def forget(self, *, rollouts: int, evaluations: int) -> None:
        """Only the process that holds the run's lock may call it; what can't be removed is told to `warn`."""
        limits = {"rollout": rollouts, "evaluation": evaluations}
        for path in sorted(self.folder.glob("*")) if self.folder.is_dir() else ():
            match = SCOPE_NAME.fullmatch(path.name)
            if match and int(match[2]) <= limits[match[1]]:
                try:
                    self._files.unlink(path)
                except OSError as error:
                    self._warn(f"{path}, whose step is in a checkpoint, can't be removed: {error}")

    def _open(self, name: str) -> None:
        assert self._descriptor < 0, f"scope {name} inside {self._path}"
        self._completions, self._searches, self._over, self._outcome = {}, {}, set(), None
        self._path = self.folder / f"{name}.{self._rank}"
        whole_bytes = 0
        try:
            for path in sorted(self.folder.glob(f"{name}.*")):
                end = self._read(path)
                if path == self._path:
                    whole_bytes = end
            if not self._replays:
                self._completions, self._searches, self._over = {}, {}, set()
                whole_bytes = whole_bytes if self._outcome is not None else 0
            make_durable_directory(self._files, self.folder)
            is_new = not self._path.exists()
            self._descriptor = self._files.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.ftruncate(self._descriptor, whole_bytes)
            if is_new:
                sync_path(self._files, self.folder)
        except OSError as error:
            self._give_up(error)
            return
        self._synced = time.monotonic()
        if not whole_bytes:
            self._append({"run": self._run})

    def _close(self) -> None:
        if self._descriptor >= 0:
            try:
                self._files.fsync(self._descriptor)
                self._files.close(self._descriptor)
            except OSError as error:
                self._warn(f"{self._path} may not survive a power cut: {error}")
        self._descriptor = -1
        self._completions, self._searches, self._over, self._outcome = {}, {}, set(), None

    def _append(self, head: dict[str, Any], body: bytes = b"") -> None:
        if self._descriptor < 0:
            return
        text = json.dumps(head).encode()
        payload = HEAD.pack(len(text)) + text + body
        rest = memoryview(FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
        end = -1
        try:
            end = os.fstat(self._descriptor).st_size
            while rest:
                taken = self._files.write(self._descriptor, rest)
                if taken <= 0:
                    raise OSError(f"the system took 0 of {len(rest)} bytes")
                rest = rest[taken:]
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                self._files.fsync(self._descriptor)
                self._synced = time.monotonic()
        except OSError as error:
            if end >= 0:
                with suppress(OSError):  # a torn frame that stays is cut off at the next start
                    os.ftruncate(self._descriptor, end)
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):  # the first error is the one that is told
                self._files.close(self._descriptor)
        self._descriptor = -1
        self._warn(
            f"The journal {self._path} can't be written: {error}. The run goes on; replies that are not in the journal "
            "are asked for again if this step is interrupted."
        )

    def _read(self, path: Path) -> int:
        """Take over the replies of one file; the length of its whole frames, 0 if it is another run's."""
        end = 0
        for head, body, place in frames(path):
            try:
                if not end and head.get("run") != self._run:
                    return 0
                self._take(head, body)
            except (KeyError, TypeError, ValueError) as error:
                self._warn(f"{path} ends at a reply that can't be read ({type(error).__name__}: {error})")
                return end
            end = place
        return end

    def _take(self, head: dict[str, Any], body: bytes) -> None:
        if "completion" in head:
            count = head["tokens"]
            ids, logprobs = array("i"), array("d")
            ids.frombytes(body[: count * ids.itemsize])
            logprobs.frombytes(body[count * ids.itemsize :])
            completion = Completion(
                request_id=0,
                role=Role(head["completion"][4]),
                token_ids=tuple(ids),
                logprobs=tuple(logprobs),
                finish_reason=FinishReason(head["finish_reason"]),
                policy_version=head["policy_version"],
            )
            self._completions[_key(head["completion"])] = _Reply(head["context"], completion)
        elif "search" in head:
            self._searches[_key(head["search"])] = build(SearchResult, head["result"])
        elif "over" in head:
            self._over.add(tuple(head["over"]))
        elif "outcome" in head:
            self._outcome = head["outcome"]


def frames(path: Path) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """(head, body, offset of the end) of each whole frame; ends before the first that is torn or damaged."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        place = 0
        while place + FRAME.size <= size:
            length, checksum = FRAME.unpack(file.read(FRAME.size))
            if not HEAD.size <= length <= min(LONGEST_FRAME_BYTES, size - place - FRAME.size):
                return
            payload = file.read(length)
            if len(payload) != length or zlib.crc32(payload) != checksum:
                return
            split = HEAD.size + HEAD.unpack_from(payload)[0]
            try:
                head = json.loads(payload[HEAD.size : split])
            except (ValueError, RecursionError):
                return
            if not isinstance(head, dict):
                return
            place += FRAME.size + length
            yield head, payload[split:], place


def _key(key: Sequence[Any]) -> Key:
    step, question_id, sample, turn, role = key
    return (step, question_id, sample, turn, str(role))


def _digest(context_ids: Sequence[int]) -> str:
    return hashlib.blake2b(array("q", context_ids).tobytes(), digest_size=8).hexdigest()
