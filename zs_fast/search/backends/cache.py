"""The documents of each query, kept in a file: nothing is asked, or paid, twice. SQLite, so that several processes may
use one file at once and a killed one leaves it whole."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

from zs_fast.errors import PreflightError, SimulatorError

_FORMAT = 1
_BUSY_TIMEOUT_S = 60.0


class SearchCache:
    """Query -> documents for one server and number of documents (`namespace`), in the file `path`.

    Raises PreflightError for a file that is none of its own, and later SimulatorError where the file can't be used.
    """

    def __init__(self, path: str, namespace: str) -> None:
        self._path = Path(os.path.expanduser(path))
        self._namespace = namespace
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S)
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise PreflightError(
                f"retriever.cache {self._path} can't be used ({error}). Name a file that may be written, on a local "
                "disk, delete this one if it is damaged, or set retriever.cache = ''."
            ) from error

    def get(self, query: str) -> tuple[str, ...] | None:
        """The documents of a query, maybe none at all; None if it was never answered."""
        try:
            row = self._connection.execute(
                "SELECT documents FROM searches WHERE namespace = ? AND query = ?", (self._namespace, query)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._failure(error) from error
        return None if row is None else tuple(json.loads(row[0]))

    def put(self, found: Mapping[str, tuple[str, ...]]) -> None:
        """Keep these; what another process has kept meanwhile stays."""
        rows = [(self._namespace, query, json.dumps(documents), int(time.time())) for query, documents in found.items()]
        try:
            with self._connection:
                self._connection.executemany("INSERT OR IGNORE INTO searches VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def close(self) -> None:
        self._connection.close()

    def _prepare(self) -> None:
        """The table of a new file; raises sqlite3.DatabaseError for a file of another kind."""
        # Readers and a writer don't wait for each other, and a commit survives kill -9; a power cut may take the last.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == 0 and tables == 0:
                self._connection.execute(
                    "CREATE TABLE searches (namespace TEXT NOT NULL, query TEXT NOT NULL, documents TEXT NOT NULL, "
                    "fetched_at INTEGER NOT NULL, PRIMARY KEY (namespace, query)) WITHOUT ROWID"
                )
                self._connection.execute(f"PRAGMA user_version = {_FORMAT}")
            elif version != _FORMAT:
                raise sqlite3.DatabaseError(f"it is a database of another kind (version {version}, not {_FORMAT})")

    def _failure(self, error: sqlite3.Error) -> SimulatorError:
        return SimulatorError(
            f"retriever.cache {self._path} failed: {error}. Free space or name another file and resume, or set "
            "retriever.cache = ''."
        )
