"""Runs of the suite side by side. Scores of two protocols never share a column."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.errors import DataError
from neobert.glue.glue_tasks import TASKS
from neobert.glue.score_table import RESULTS_FILE, align, show


def load_results(path: Path) -> dict[str, Any]:
    """`results.json` of a folder, or the file itself.

    Raises:
        DataError: there is none, or it is no results file.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        found: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); give the output folder of neobert glue") from error
    if not isinstance(found, dict) or not {"model", "protocol", "tasks", "average"} <= found.keys():
        raise DataError(f"{file} is no {RESULTS_FILE} of neobert glue; give its output folder")
    return found


def compare_results(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table with a row for each run and a column for each task and protocol, and what the protocols differ in."""
    tasks = [name for name in TASKS if any(name in run["tasks"] for run in runs)]
    header, notes = ["model"], []
    columns: list[list[str]] = []
    for name in tasks:
        digests = list(dict.fromkeys(run["tasks"][name]["digest"] for run in runs if name in run["tasks"]))
        for digest in digests:
            header.append(name if len(digests) == 1 else f"{name} [{digest[:4]}]")
            columns.append([_show_task(run["tasks"].get(name), digest) for run in runs])
        notes += [_explain(runs, name, digests)] if len(digests) > 1 else []
    for digest in dict.fromkeys(run["protocol"]["digest"] for run in runs):
        (of, *_) = (run["average"]["of"] for run in runs if run["protocol"]["digest"] == digest)
        header.append(f"{of} [{digest[:4]}]")
        columns.append([_show_average(run, digest) for run in runs])
    if len({run["protocol"]["digest"] for run in runs}) > 1:
        notes.append("averages of different protocols are not comparable; each has its own column")
    rows = [header, *([str(run["model"]), *(column[number] for column in columns)] for number, run in enumerate(runs))]
    legend = "best of grid, mean ± deviation over seeds (median of grid), validation splits"
    return "\n".join([*align(rows), legend, *notes])


def _show_task(task: Mapping[str, Any] | None, digest: str) -> str:
    if task is None or task["digest"] != digest:
        return ""
    return show(task["best"]) + ("" if task["median"] is None else f" ({100 * task['median']['mean']:.1f})")


def _show_average(run: Mapping[str, Any], digest: str) -> str:
    average = run["average"]
    if run["protocol"]["digest"] != digest or average["best"] is None:
        return ""
    return f"{100 * average['best']:.1f} ({100 * average['median']:.1f})"


def _explain(runs: Sequence[Mapping[str, Any]], name: str, digests: Sequence[str]) -> str:
    """What the protocols of a task differ in."""
    protocols = {run["tasks"][name]["digest"]: run["protocol"]["tasks"][name] for run in runs if name in run["tasks"]}
    flat = [_flatten(protocols[digest]) for digest in digests]
    keys = sorted({key for one in flat for key in one if any(one.get(key) != other.get(key) for other in flat)})
    return f"{name}: {len(digests)} protocols, which are not comparable; they differ in {', '.join(keys)}"


def _flatten(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in protocol.items() if key != "settings"}, **protocol["settings"]}
