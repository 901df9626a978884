"""The errors a person may meet. Each message names the thing, its value, the limit and the way out."""

from __future__ import annotations


class ZsError(Exception):
    """Base of every error that zs_fast raises on purpose. `exit_code` is what `zs-fast` exits with."""

    exit_code = 1
    is_shared = False
    """Every process of the run raises it (system/distributed.together), so that one may speak for all."""


class ConfigError(ZsError):
    """A recipe or a command-line override holds a wrong key or value."""

    exit_code = 2


class DataError(ZsError):
    """A data file can't be read or holds a bad row; the message names file, row and field."""

    exit_code = 2


class PreflightError(ZsError):
    """Something the run needs is missing at start: a model, a server, a package, disk space."""

    exit_code = 3


class CheckpointError(ZsError):
    """A checkpoint can't be written (`exit_code` 4) or can't be used (`CheckpointUnusableError`, 5)."""

    exit_code = 4


class CheckpointUnusableError(CheckpointError):
    """A checkpoint is damaged, or belongs to another configuration."""

    exit_code = 5


class EngineError(ZsError):
    """The engine was asked for something it can't do, or broke."""

    exit_code = 6


class SimulatorError(ZsError):
    """Too many searches of a step failed, or the simulator is gone."""

    exit_code = 6


class NonFiniteError(ZsError):
    """Losses, gradients or weights stopped to be numbers; nothing more can be learnt without a change."""

    exit_code = 7


class MemoryBudgetError(ZsError):
    """A setting asks for more memory than there is."""

    exit_code = 3
