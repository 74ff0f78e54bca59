"""Scores of a model by task: mean and standard deviation over seeds, of the best point of the grid and of the median
one."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from neobert.config.schema import Config
from neobert.glue.cells import Cell, CellResult, digest
from neobert.glue.glue_tasks import AVERAGED, TASKS, describe_average
from neobert.glue.grids import GridPoint
from neobert.glue.starts import ModelStart

RESULTS_FILE = "results.json"


def build_results(
    config: Config,
    start: ModelStart,
    results: Mapping[Cell, CellResult],
    protocols: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        results: all cells of every finished task.
        protocols: of the finished tasks, and of those that their models answer.
    """
    tasks = {
        name: _summarise_task(name, results) | {"digest": digest(protocol)} for name, protocol in protocols.items()
    }
    scored = [name for name in AVERAGED if name in tasks]
    return {
        "model": start.name,
        "model_digest": digest(start.identity),
        "protocol": {
            "digest": digest({name: task["digest"] for name, task in tasks.items()}),
            "grid": config.glue.grid,
            "tasks": dict(protocols),
        },
        "tasks": tasks,
        "average": {
            "of": describe_average(scored),
            "best": _mean([tasks[name]["best"]["mean"] for name in scored]),
            "median": _mean([tasks[name]["median"]["mean"] for name in scored]),
        },
        "seconds": sum(result.seconds for result in results.values()),
        "cells": [asdict(cell) | asdict(result) for cell, result in sorted(results.items())],
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def score_of(name: str, result: CellResult) -> float | None:
    """The score of a task in a cell of the task that trained its model; None where its labels are unknown."""
    if TASKS[name].trained_on is None:
        return result.score
    found = [result.metrics.get(f"{name}/{split}") for split in TASKS[name].splits]
    return None if None in found else statistics.fmean(x for metrics in found if metrics for x in metrics.values())


def _summarise_task(name: str, results: Mapping[Cell, CellResult]) -> dict[str, Any]:
    trained_on = TASKS[name].trained_on or name
    scores: dict[GridPoint, list[float]] = {}
    metrics: dict[GridPoint, list[dict[str, dict[str, float]]]] = {}
    for cell, result in results.items():
        score = score_of(name, result)
        if cell.task == trained_on and score is not None:
            scores.setdefault(cell.point, []).append(score)
            metrics.setdefault(cell.point, []).append(result.metrics)
    if not scores:
        return {"best": None, "median": None, "points": []}
    points = [{**asdict(point), **describe_spread(values)} for point, values in scores.items()]
    best = max(scores, key=lambda point: statistics.fmean(scores[point]))
    return {
        "best": {
            **asdict(best),
            **describe_spread(scores[best]),
            "metrics": {
                split: {metric: _mean([x[split][metric] for x in metrics[best]]) for metric in found}
                for split, found in metrics[best][0].items()
            },
        },
        "median": _median(points),
        "points": points,
    }


def describe_spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; the deviation of one seed is not known."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


def _median(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the means of the points, and of their deviations."""
    deviations = [point["std"] for point in points if point["std"] is not None]
    return {
        "mean": statistics.median(point["mean"] for point in points),
        "std": statistics.median(deviations) if deviations else None,
        "points": len(points),
    }


# ---- as text ----


def show(spread: Mapping[str, Any] | None) -> str:
    """`91.2 ± 0.3`: percent."""
    if spread is None:
        return "no labels"
    return f"{100 * spread['mean']:.1f}" + ("" if spread["std"] is None else f" ± {100 * spread['std']:.1f}")


def describe_results(results: Mapping[str, Any]) -> str:
    """The table of one model."""
    rows = [("task", "metric", "best of grid", "at", "median of grid")]
    for name, task in results["tasks"].items():
        best = task["best"]
        at = "" if best is None else f"lr {best['lr']:g}, {best['batch']} rows"
        rows.append((name, " + ".join(TASKS[name].metrics), show(best), at, show(task["median"])))
    protocol = results["protocol"]
    average = results["average"]
    seeds = {len(task["seeds"]) for task in protocol["tasks"].values()}
    return "\n".join(
        [
            f"model {results['model']} ({results['model_digest']}), protocol {protocol['digest']}: grid "
            f"{protocol['grid']}, {max(seeds, default=0)} seed(s), validation splits, best evaluation of each run",
            *align(rows),
            *([] if average["best"] is None else [f"{average['of']}: {_percent(average)}"]),
        ]
    )


def _percent(average: Mapping[str, Any]) -> str:
    return f"{100 * average['best']:.1f} (best of grid), {100 * average['median']:.1f} (median of grid)"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths)).rstrip() for row in rows]
