"""One self-contained HTML page of one run or several: curves, final figures, settings that differ, rollouts to read.

Nothing is loaded from elsewhere. All text is untrusted: the template escapes it, the rest travels as JSON in a data
block whose `<` are escaped, and the page's script writes it with `textContent` alone. The page's content security
policy allows the one script and the one style sheet by their hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from zs_fast.errors import DataError
from zs_fast.report.charts import charts_of
from zs_fast.report.rollouts import read_rollouts
from zs_fast.report.run_data import RunData, read_runs
from zs_fast.report.tables import differing_settings, final_figures
from zs_fast.system.files import FileOperations, replace_file

SCRIPTS = ("charts.js", "reader.js")
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
"""Control characters and the pictures of them that a reader can see; as many characters as before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was written: the page, its size, and how many of the recorded rollouts are in it."""

    path: Path
    num_bytes: int
    num_runs: int
    num_rollouts: int
    num_rollouts_recorded: int


def write_report(folders: Sequence[Path], path: Path | None = None, *, most_rollouts: int | None = None) -> Report:
    """The page of these run folders. path: `report.html` in the folder of a single run, when not given.

    most_rollouts: on the page, of all runs together; 0 for all, None for a stated sample of a size that opens quickly.
    Raises DataError when a folder holds no run, a row is broken before the last line, or the page can't be written.
    """
    runs = read_runs([Path(folder) for folder in folders])
    if path is None:
        if len(runs) != 1:
            raise DataError(f"a page of {len(runs)} runs belongs to no run's folder. Give its file.")
        path = runs[0].folder / "report.html"
    reader = read_rollouts(runs, most_rollouts)
    charts, thinned = charts_of(runs)
    data = {
        "runs": [run.label for run in runs],
        "charts": charts,
        "rollouts": reader.rollouts,
        "prompts": reader.prompts,
    }
    here = Path(__file__).parent
    script = "".join((here / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (here / "page.css").read_text(encoding="utf-8")
    page = _template().render(
        runs=[visible(_header(run)) for run in runs],
        title=visible(runs[0].label if len(runs) == 1 else f"{len(runs)} runs"),
        figures=visible([(row.name, row.values) for row in final_figures(runs)]),
        settings=visible([(row.name, row.values) for row in differing_settings(runs)]),
        have_settings=all(run.settings for run in runs),
        reader_notes=visible(reader.notes),
        num_rollouts=len(reader.rollouts),
        num_recorded=reader.num_recorded,
        thinned=thinned,
        data=embed(data),
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
    )
    content = page.encode("utf-8")
    try:
        replace_file(FileOperations(), Path(path), content)
    except OSError as error:
        raise DataError(
            f"{path} can't be written: {error.strerror or error}. Give another file with --output."
        ) from error
    return Report(
        path=Path(path),
        num_bytes=len(content),
        num_runs=len(runs),
        num_rollouts=len(reader.rollouts),
        num_rollouts_recorded=reader.num_recorded,
    )


def visible(value: Any) -> Any:
    """Plain data with every text made safe to show, character for character: surrogates and control characters."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value).translate(_CONTROLS)
    if isinstance(value, dict):
        return {visible(key): visible(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [visible(inner) for inner in value]
    return value


def embed(data: Any) -> str:
    """JSON that no HTML parser can mistake for markup: ASCII without `<`, `>` and `&`."""
    text = json.dumps(visible(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _header(run: RunData) -> dict[str, Any]:
    return {
        "label": run.label,
        "num_steps": run.num_steps,
        "notes": list(run.notes),
        "config": run.config_text,
        "environment": run.environment_text,
    }


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
