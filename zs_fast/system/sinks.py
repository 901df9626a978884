"""TensorBoard and Weights & Biases, each opened only when asked for."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from zs_fast.config import LogConfig
from zs_fast.errors import PreflightError
from zs_fast.system.files import FileOperations, replace_file


class Sink(Protocol):
    """A second place for the numbers; the files in the run folder are the first."""

    def write(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None: ...

    def truncate(self, step: int) -> None:
        """The run goes on after `step`: later numbers are to be forgotten, where the service can."""
        ...

    def close(self) -> None: ...


def make_sinks(folder: Path, log: LogConfig, *, name: str, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks that `log` asks for. Raises PreflightError naming what one of them lacks."""
    sinks: list[Sink] = []
    if log.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if log.wandb:
        sinks.append(WandbSink(folder, project=log.wandb_project, name=name, config=config))
    return sinks


class TensorBoardSink:
    """Event files in `<run>/tensorboard`; timings stand under `timings/`."""

    def __init__(self, folder: Path) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise PreflightError(
                f"log.tensorboard is true, but TensorBoard can't be imported ({error}). Run `pip install tensorboard`, "
                "or use --log.tensorboard False."
            ) from error
        self._folder = folder
        self._make_writer = module.SummaryWriter
        self._writer = self._make_writer(str(folder))

    def write(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, float(value), step)
        for key, value in timings.items():
            self._writer.add_scalar(f"timings/{key}", float(value), step)

    def truncate(self, step: int) -> None:
        self._writer.close()
        self._writer = self._make_writer(str(self._folder), purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One W&B run per run folder: its id stands in `<run>/wandb_id`, so that a resume goes on in the same run.

    The key is W&B's own business and comes from the environment only.
    """

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise PreflightError(
                f"log.wandb is true, but wandb can't be imported ({error}). Run `pip install wandb`, or use "
                "--log.wandb False."
            ) from error
        # Without a key wandb asks for one on the terminal, and the run hangs.
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
            raise PreflightError(
                "log.wandb is true, but the environment variable WANDB_API_KEY is not set. Set it, or set "
                "WANDB_MODE=offline, or use --log.wandb False."
            )
        identity = folder / "wandb_id"
        if not identity.exists():
            replace_file(FileOperations(), identity, uuid.uuid4().hex.encode() + b"\n")
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(folder),
            config=dict(config),
            id=identity.read_text(encoding="ascii").strip(),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        values |= {f"timings/{key}": float(value) for key, value in timings.items()}
        self._run.log(values, step=step)

    def truncate(self, step: int) -> None:
        pass  # W&B drops rows whose step it has already seen, which are those that a resume repeats

    def close(self) -> None:
        self._run.finish()
