"""The report of one run or several: one HTML file that needs nothing else, no network and no server.

The page holds its data as JSON, a viewer of ours, and uPlot (MIT, 53 kB), which draws the curves. Numbers are those of
`log.jsonl`, thinned; text of files and configs is escaped here, and the viewer sets it as text. A content security
policy lets no other script run and nothing be loaded.
"""

import base64
import hashlib
import html
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.disk import write_text
from neobert.errors import UserError
from neobert.secrets import scrub
from neobert.train.report.curves import Axes, build_charts
from neobert.train.report.incidents import list_incidents
from neobert.train.report.log_reader import RunLog, read_events
from neobert.train.report.run_summary import (
    SavedConfig,
    Table,
    describe_config,
    list_commands,
    list_defaults,
    read_config,
    read_environment,
    summarise_run,
)

REPORT = Path("report") / "index.html"
"""Where a run writes its report, below its output folder."""


DEFAULT = "the default"


class ReportError(UserError):
    """There is no run to report about; the message names the folder and the remedy."""


class RunReport:
    """One run as a page shows it. The same object reads only what is new of the log each time."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        """`config` is what `config.yaml` says, where it is known: it is slow to read."""
        self.folder, self.path = folder, folder / REPORT
        self.log = RunLog(folder / "log.jsonl")
        self._config: Config | None = config
        self._saved: SavedConfig | None = None

    def read(self) -> "RunView":
        """What the folder holds now.

        Raises:
            OSError: `log.jsonl` cannot be read.
        """
        self.log.update()
        if self._saved is None:
            config = self._config
            self._saved = read_config(self.folder / "config.yaml") if config is None else describe_config(config)
        return RunView(self.folder, self.log, self._saved)


class RunView:
    """The parts of a page that are about one run."""

    def __init__(self, folder: Path, log: RunLog, saved: SavedConfig) -> None:
        events, axes = read_events(folder / "events.jsonl"), Axes(log)
        self.folder, self.saved = folder, saved
        self.charts = build_charts(log)
        self.incidents, self.num_unlisted = list_incidents(events, axes)
        self.summary = summarise_run(log, events, axes)
        self.machine, self.model = read_environment(events)
        self.commands = list_commands(folder, saved.config, events)

    def as_data(self, name: str) -> dict[str, Any]:
        """For the viewer."""
        return {
            "name": name,
            "charts": [chart.as_data() for chart in self.charts],
            "incidents": [asdict(incident) for incident in self.incidents],
        }


def check_runs(folders: Sequence[Path]) -> None:
    """Raises where a folder is none of a run.

    Raises:
        ReportError: naming it.
    """
    for folder in folders:
        if not (folder / "log.jsonl").is_file():
            raise ReportError(f"{folder} holds no log.jsonl; name the output folder of a run (its trainer.output_dir)")


def write_report(reports: Sequence[RunReport], path: Path) -> None:
    """Writes the page of one run, or of several side by side, as a whole or not at all.

    Raises:
        OSError: a log cannot be read, or the page cannot be written.
    """
    text = render_page([report.read() for report in reports])
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".new-*-{path.name}"):  # Of a run that was killed while it wrote.
        leftover.unlink(missing_ok=True)
    write_text(path, text)


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Short names, each of one folder: the last part of a path, or the whole path where two end alike."""
    names = [folder.resolve().name for folder in folders]
    return [scrub(n if names.count(n) == 1 else str(folder)) for n, folder in zip(names, folders)]


# ---- HTML ----


@cache
def _read_part(name: str) -> str:
    return files("neobert.train.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _scripts() -> tuple[str, str]:
    """The scripts of a page, and what the policy calls them."""
    notice = _read_part("uplot/LICENSE").strip()
    sources = (f"/*! uPlot\n{notice}\n*/\n{_read_part('uplot/uPlot.iife.min.js')}", _read_part("viewer.js"))
    digests = (base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return "".join(f"<script>{source}</script>\n" for source in sources), allowed


def render_page(views: Sequence[RunView]) -> str:
    """The HTML of a page about runs."""
    names = name_runs([view.folder for view in views])
    scripts, allowed = _scripts()
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
    data = [view.as_data(name) for view, name in zip(views, names)]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)} - NeoBERT report</title>
<style>
{_read_part("uplot/uPlot.min.css")}
{_read_part("page.css")}
</style>
</head>
<body>
<header><h1>{_text(title)}</h1><p>NeoBERT report, written {_text(when)}</p></header>
<main>
{_table("Summary", names, [view.summary for view in views], compares=False)}
<section id="controls" hidden></section>
<section id="charts"><noscript><p>The curves need JavaScript; log.jsonl has their numbers.</p></noscript></section>
{_incidents(views, names)}
{_config(views, names)}
{_table("Model", names, [view.model for view in views])}
{_table("Environment", names, [view.machine for view in views])}
{_commands(views, names)}
</main>
<script type="application/json" id="data">{_as_json(data)}</script>
{scripts}</body>
</html>
"""


def _text(value: str) -> str:
    """Text as HTML; half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark."""
    return html.escape(value, quote=True).encode("utf-8", "replace").decode()


def _as_json(value: Any) -> str:
    """JSON that cannot end the element it is in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _table(
    title: str, names: Sequence[str], columns: Sequence[Table], *, fold: bool = False, compares: bool = True
) -> str:
    """A row a name, a column a run; with `compares`, what differs between runs is marked."""
    rows = list(dict.fromkeys(name for column in columns for name in column))
    if not rows:
        return ""
    head = "" if len(names) == 1 else f"<thead><tr><th></th>{_cells(names, 'th')}</tr></thead>"
    lines = []
    for name in rows:
        values = [column.get(name, "-") for column in columns]
        compared = {value for title, value in zip(names, values) if title != DEFAULT}
        mark = ' class="differs"' if compares and len(compared) > 1 else ""
        lines.append(f"<tr{mark}><th>{_text(name)}</th>{_cells(values, 'td')}</tr>")
    table = f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'
    if fold:
        return f"<details><summary>{_text(title)}</summary>{table}</details>"
    return f"<section><h2>{_text(title)}</h2>{table}</section>"


def _cells(values: Iterable[str], kind: str) -> str:
    return "".join(f"<{kind}>{_text(value)}</{kind}>" for value in values)


def _config(views: Sequence[RunView], names: Sequence[str]) -> str:
    """What a run, or one of several, has set to another value than the default; the rest folded."""
    changed = {key for view in views for key in view.saved.changed}
    defaults: Table = list_defaults()

    def choose(wanted: Callable[[str], bool]) -> tuple[list[str], list[Table]]:
        columns = [{k: v for k, v in view.saved.values.items() if wanted(k)} for view in views]
        keys = {key for column in columns for key in column}
        return [DEFAULT, *names], [{k: v for k, v in defaults.items() if k in keys}, *columns]

    problems = [
        f"<p>{_text(f'{name}: config.yaml cannot be read: {view.saved.problem}')}</p>"
        for name, view in zip(names, views)
        if view.saved.problem is not None
    ]
    set_keys, others = choose(lambda key: key in changed), choose(lambda key: key not in changed)
    return "\n".join(
        [
            *problems,
            _table("Config: what differs from the defaults", *set_keys),
            _table("Config: the keys at their defaults", *others, fold=True),
        ]
    )


def _incidents(views: Sequence[RunView], names: Sequence[str]) -> str:
    rows, notes = [], []
    for name, view in zip(names, views):
        for incident in view.incidents:
            when = "" if incident.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident.time))
            cells = [f"{incident.step:,}", when, incident.name, incident.details]
            mark = ' class="fault"' if incident.is_fault else ""
            rows.append(f"<tr{mark}>{_cells(cells if len(names) == 1 else [name, *cells], 'td')}</tr>")
        if view.num_unlisted:
            notes.append(f"<p>{_text(name)}: {view.num_unlisted:,} more are in events.jsonl</p>")
    if not rows:
        return "<section><h2>Incidents</h2><p>None.</p></section>"
    titles = ["step", "time", "what", "details"]
    head = _cells(titles if len(names) == 1 else ["run", *titles], "th")
    table = f'<table class="incidents"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<section><h2>Incidents</h2>{"".join(notes)}<div class="scroll tall">{table}</div></section>'


def _commands(views: Sequence[RunView], names: Sequence[str]) -> str:
    parts = [
        (f"<h3>{_text(name)}</h3>" if len(names) > 1 else "") + f"<pre>{_text(chr(10).join(view.commands))}</pre>"
        for name, view in zip(names, views)
    ]
    return f"<section><h2>Next</h2>{''.join(parts)}</section>"
