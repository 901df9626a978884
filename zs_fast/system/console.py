"""The screen of a run: a live table with progress bars on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

ROWS_SHOWN = 12

COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("f1", "reward/f1", "{:.3f}"),
    ("searches", "trajectory/searches", "{:.2f}"),
    ("noise", "curriculum/noise_probability", "{:.2f}"),
    ("tokens/s", "rollout/tokens_per_second", "{:,.0f}"),
    ("seconds", "seconds", "{:.1f}"),
)
"""(title, name among metrics and timings, format) of what is shown of each step. `seconds` is that of all phases."""


class Screen(Protocol):
    """What a person sees while the run goes on."""

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None: ...

    def progress(self, label: str, done: int, total: int) -> None: ...

    def note(self, message: str) -> None: ...

    def truncate(self, step: int) -> None: ...

    def close(self) -> None: ...


def make_screen(total_steps: int, name: str, console: Console | None = None) -> Screen:
    """A live screen where standard output is a terminal, else plain lines. Without steps: phases and notes alone."""
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveScreen(total_steps, name, console)
    return PlainScreen(total_steps, console)


class PlainScreen:
    """One line per step, for pipes and log files."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self._total = total_steps
        self._console = console

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        of_total = f"/{self._total}" if self._total else ""
        cells = zip((title for title, _, _ in COLUMNS), _cells(metrics, timings), strict=True)
        self._print(f"step {step}{of_total}  " + "  ".join(f"{title} {cell}" for title, cell in cells))

    def progress(self, label: str, done: int, total: int) -> None:
        pass

    def note(self, message: str) -> None:
        self._print(message)

    def truncate(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass

    def _print(self, line: str) -> None:
        # Text is taken as it is: question texts and paths may hold what rich would read as markup.
        self._console.print(Text(line), soft_wrap=True)
        self._console.file.flush()


class LiveScreen:
    """The last steps in a table, one bar for the run and one for the step's current phase."""

    def __init__(self, total_steps: int, name: str, console: Console) -> None:
        self._rows: deque[tuple[int, list[str]]] = deque(maxlen=ROWS_SHOWN)
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._run_bar = self._bars.add_task(name, total=total_steps or None, visible=total_steps > 0)
        self._phase = "starting"
        self._phase_bar = self._bars.add_task(self._phase, total=None)
        self._live = Live(self._render(), console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        self._rows.append((step, _cells(metrics, timings)))
        self._bars.update(self._run_bar, completed=step)
        self._live.update(self._render())

    def progress(self, label: str, done: int, total: int) -> None:
        if label != self._phase or done == 0:
            self._bars.reset(self._phase_bar)  # its clock too
        self._phase = label
        self._bars.update(self._phase_bar, description=label, completed=done, total=total)

    def note(self, message: str) -> None:
        self._live.console.print(Text(message))

    def truncate(self, step: int) -> None:
        self._bars.update(self._run_bar, completed=step)

    def close(self) -> None:
        self._bars.update(self._phase_bar, visible=False)
        self._live.stop()

    def _render(self) -> Group:
        if not self._rows:
            return Group(self._bars)
        table = Table("step", *(title for title, _, _ in COLUMNS), box=None, pad_edge=False, header_style="bold")
        for column in table.columns:
            column.justify = "right"
        for step, cells in self._rows:
            table.add_row(str(step), *cells)
        return Group(table, self._bars)


def _cells(metrics: Mapping[str, float], timings: Mapping[str, float]) -> list[str]:
    phases = [float(value) for name, value in timings.items() if name.endswith("/seconds")]
    values = ({"seconds": sum(phases)} if phases else {}) | {**timings, **metrics}
    return [form.format(float(values[name])) if name in values else "-" for _, name, form in COLUMNS]
