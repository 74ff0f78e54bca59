"""The page of a run: its numbers are those of the log, no spike is lost, and text is only text."""

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import log_lines

from neobert.commands.report_runs import report
from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.errors import CallError
from neobert.train.loop import pretrain
from neobert.train.record import tracking
from neobert.train.report.curves import MOST_POINTS, thin
from neobert.train.report.incidents import MOST_INCIDENTS
from neobert.train.report.log_reader import RunLog
from neobert.train.report.page import REPORT, ReportError, RunReport, write_report

Tiny = Callable[..., Config]
Line = dict[str, Any]


def step_line(step: int, loss: float | None = None, **more: Any) -> Line:
    values = {"loss": 9.0 - step / 7 if loss is None else loss, "grad_norm": 1 / step, "lr": step / 1e5}
    return {"kind": "step", "step": step, **values, "num_tokens": 100, "num_targets": 31, **more}


def interval_line(step: int, **more: Any) -> Line:
    measured = {"tokens_per_second": 50.0 + step, "mfu": None, "data_wait": 0.01, "packing_fill": 0.99}
    sizes = {"peak_memory_bytes": 2**30 + step, "tokens": 100 * step, "seconds": 20.0, "skipped": 0}
    return {"kind": "log", "step": step, "first_step": step - 9, "loss": 8.5, **measured, **sizes, **more}


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, config: Config, lines: Sequence[Line], events: Sequence[Line] = ()) -> Path:
    write_lines(folder / "log.jsonl", lines)
    write_lines(folder / "events.jsonl", [{"event": "started", "step": 0, "time": 1.0}, *events])
    (folder / "config.yaml").write_text(config_to_yaml(config))
    return folder


def read_page(*folders: Path) -> tuple[str, list[Line]]:
    """The page about runs, and the data in it."""
    path = folders[0].parent / "page.html"
    write_report([RunReport(folder) for folder in folders], path)
    text = path.read_text()
    return text, read_data(text)


def read_data(text: str) -> list[Line]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    found: list[Line] = json.loads(data)
    return found


def curve_of(run: Line, title: str, label: str) -> Line:
    (chart,) = (chart for chart in run["charts"] if chart["title"] == title)
    (curve,) = (curve for curve in chart["curves"] if curve["label"] == label)
    found: Line = curve
    return found


def points(curve: Line) -> list[tuple[int, float]]:
    return list(zip(curve["step"], curve["y"]))


def test_the_numbers_of_a_run_are_those_of_its_log(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny(out, "trainer.log_statistics=true", "trainer.log_train_accuracy=true", "trainer.ema_decay=0.9")
    pretrain(config)
    text = (out / REPORT).read_text()
    (run,) = read_data(text)
    steps, intervals = log_lines(out, "step"), log_lines(out, "log")
    for title, label, name in (
        ("Loss", "train, each step", "loss"),
        ("Gradient norm", "each step, before clipping", "grad_norm"),
        ("Learning rate", "each step", "lr"),
    ):
        assert points(curve_of(run, title, label)) == [(x["step"], x[name]) for x in steps]
    for title, label, name in (
        ("Loss", "train, mean of the interval", "loss"),
        ("Accuracy", "train", "accuracy"),
        ("Tokens a second", "training", "tokens_per_second"),
        ("MFU and data wait", "data wait, of the time", "data_wait"),
        ("Packing fill", "real tokens, of all slots", "packing_fill"),
        ("Grad norm by kind of weight", "qkv", "grad_norm/qkv"),
        ("Logsumexp", "max", "logsumexp/max"),
    ):
        curve = curve_of(run, title, label)
        assert points(curve) == [(x["step"], x[name]) for x in intervals]
        assert curve["tokens"] == [x["tokens"] for x in intervals]
        assert curve["seconds"] == pytest.approx(np.cumsum([x["seconds"] for x in intervals]), abs=0.01)
    for kind, label in (("eval", "held-out"), ("eval_ema", "held-out, averaged weights")):
        for title, name in (("Loss", "loss"), ("Accuracy", "accuracy")):
            assert points(curve_of(run, title, label)) == [(x["step"], x[name]) for x in log_lines(out, kind)]
    rates = [(x["step"], x["num_targets"] / x["num_tokens"]) for x in steps]
    assert points(curve_of(run, "Mask rate", "predicted tokens, of all")) == rates
    assert "<td>finished at step 12</td>" in text
    assert f"neobert predict {out}" in text, "the commands that the run printed"
    assert "<th>parameters without the vocabulary</th>" in text
    assert "<th>torch</th>" in text


def test_a_run_refreshes_its_page_at_evaluations_and_at_the_end(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def write(reports: Sequence[RunReport], path: Path) -> None:
        write_report(reports, path)
        seen.append(len(curve_of(read_data(path.read_text())[0], "Loss", "held-out")["y"]))

    monkeypatch.setattr(tracking, "write_report", write)
    pretrain(tiny(tmp_path / "run"))
    assert seen == [1, 2, 3, 4, 4], "evaluations at steps 0, 4, 8 and 12, and the end"


def test_a_page_that_cannot_be_written_does_not_stop_a_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "report").write_text("a file where the folder should be")
    assert pretrain(tiny(out, "trainer.max_steps=4", "trainer.eval_strategy=no")).reason == "finished"
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    failed = [(e["step"], "exists" in e["problem"]) for e in events if e["event"] == "report_failed"]
    assert failed == [(4, True)] * 2, "at the evaluation and at the end"
    said = capsys.readouterr().out
    assert (said.count("could not be written"), "report: " in said) == (2, False)


def test_thinning_keeps_every_bucket_s_lowest_and_highest_and_both_ends() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[31_415, 77_777]] = 50.0, -50.0
    kept = thin(values)
    assert MOST_POINTS * 0.9 < len(kept) <= MOST_POINTS
    assert {0, 31_415, 77_777, 99_999} <= set(kept)
    assert list(kept) == sorted(kept)
    # Whatever part is looked at, its range is there, but for what is cut at the ends of the part.
    for start in range(0, 100_000, 10_000):
        inside = kept[(kept >= start) & (kept < start + 10_000)]
        assert values[inside].max() == values[start : start + 10_000].max()
        assert values[inside].min() == values[start : start + 10_000].min()
    assert list(thin(values[:5])) == [0, 1, 2, 3, 4]


def test_a_long_run_is_a_small_page_without_a_lost_spike(tiny: Tiny, tmp_path: Path) -> None:
    noise = random.Random(0)
    lines = [step_line(step, 3 + noise.random()) for step in range(1, 30_001)]
    lines[20_000]["grad_norm"], lines[9_999]["loss"] = 1234.5, 77.25
    run = write_run(tmp_path / "run", tiny(tmp_path / "run"), lines)
    text, (data,) = read_page(run)
    assert (20_001, 1234.5) in points(curve_of(data, "Gradient norm", "each step, before clipping"))
    loss = curve_of(data, "Loss", "train, each step")
    assert (10_000, 77.25) in points(loss)
    assert (loss["num_points"], len(loss["y"]) <= MOST_POINTS) == (30_000, True)
    logged = {line["step"]: line["loss"] for line in lines}
    assert all(logged[step] == y for step, y in points(loss)), "no value that is not in the log"
    assert len(text) < 500_000


def test_incidents_are_at_their_step_tokens_and_seconds(tiny: Tiny, tmp_path: Path) -> None:
    lines = [*map(step_line, range(1, 21)), interval_line(10), interval_line(20, seconds=40.0)]
    lines[4]["loss"] = None
    bad = {"url": "/data/a.jsonl", "num_sampled": 100, "num_bad": 3}
    events = [
        {"event": "inventory", "step": 0, "files": [bad, {"url": "/data/b.gz", "is_fault": True, "problem": "torn"}]},
        {"event": "environment", "step": 0, "machine": {"torch": "2.0"}, "model": {"parameters": 1234567}},
        {"event": "skipped_step", "step": 5, "loss": "nan", "rows": [[16, 19]]},
        {"event": "saved", "step": 8, "path": "checkpoints/8"},
        {"event": "bad_records", "step": 10, "bad": 7, "skipped": 0, "dropped": 0},
        {"event": "resumed", "step": 15, "time": 1e9, "path": "checkpoints/15", "declared": []},
        {"event": "save_failed", "step": 16, "problem": "No space left on device"},
    ]
    text, (data,) = read_page(write_run(tmp_path / "run", tiny(tmp_path / "run"), lines, events))
    found = [(x["step"], x["tokens"], x["seconds"], x["name"], x["is_fault"]) for x in data["incidents"]]
    assert found == [
        (0, 0, 0.0, "bad records", True),
        (0, 0, 0.0, "bad records", True),
        (5, 500, 10.0, "skipped step", True),
        (10, 1000, 20.0, "bad records", True),
        (15, 1500, 40.0, "resumed", False),
        (16, 1600, 44.0, "save failed", True),
    ]
    for words in ("No space left on device", "3 of 100 records", "/data/b.gz is not read: torn", "[[16, 19]]"):
        assert words in text.replace("&quot;", '"')
    loss = curve_of(data, "Loss", "train, each step")
    assert (loss["num_missing"], 5 in loss["step"]) == (1, False), "what is not finite is counted"
    assert "<td>1,234,567</td>" in text
    assert "resumed at step 15" in text
    assert "--trainer.resume_from_checkpoint latest" in text, "a run that did not finish is continued"


def test_of_very_many_incidents_the_first_and_the_last_are_listed(tiny: Tiny, tmp_path: Path) -> None:
    events = [{"event": "skipped_step", "step": step, "loss": "inf"} for step in range(1, 2001)]
    text, (data,) = read_page(write_run(tmp_path / "run", tiny(tmp_path / "run"), [step_line(1)], events))
    steps = [x["step"] for x in data["incidents"]]
    assert (len(steps), steps[0], steps[-1]) == (MOST_INCIDENTS, 1, 2000)
    assert "1,500 more are in events.jsonl" in text


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def test_text_of_files_is_only_text(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "violets-are-blue")
    config = tiny(tmp_path, f"model.name={EVIL}", 'trainer.fill_mask_texts=["hf_abcdefghijklmnopqrstuvwx [MASK]"]')
    lines = [step_line(1), interval_line(10, source_tokens={EVIL: 3, "b": 1}, **{f"{EVIL}/x": 1.0})]
    events = [{"event": EVIL, "step": 1, "problem": f"\ud800 {EVIL} violets-are-blue", "huge": 10**400}]
    events += [{"event": "environment", "step": 0, "machine": {EVIL: EVIL}, "model": {}}]
    events += [{"event": "finished", "step": 10, "saved": True, "next": [EVIL]}]
    text, (data,) = read_page(write_run(tmp_path / "<script>alert(3)<", config, lines, events))
    assert EVIL not in text
    assert "? &lt;/script&gt;" in text, "half a surrogate pair"
    tags = re.findall(r"<[a-z!/][^>]*", re.sub(r"<(script|style)[ >].*?</\1>", "", text, flags=re.DOTALL))
    assert not [tag for tag in tags if re.match(r"<img|<script(?! type=)", tag) or "onerror" in tag]
    assert text.count("<script") == 3
    assert points(curve_of(data, "Tokens by source", EVIL)) == [(10, 0.75)], "and it is the text that it was"
    assert data["name"] == "<script>alert(3)<"
    assert "violets-are-blue" not in text
    assert "hf_abcdefghijklmnopqrstuvwx" not in text


def test_a_page_loads_nothing(tiny: Tiny, tmp_path: Path) -> None:
    text, _ = read_page(write_run(tmp_path / "run", tiny(tmp_path / "run"), [step_line(1)]))
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(src|href)=|url\(|@import|http-equiv=.refresh", outside)
    assert "default-src 'none'; script-src 'sha256-" in outside
    assert "Permission is hereby granted, free of charge" in text, "the licence of what is in the page"


def test_several_runs_are_on_one_page(tiny: Tiny, tmp_path: Path) -> None:
    lines = [step_line(1), {"kind": "eval", "step": 1, "loss": 8.0}]
    one = write_run(tmp_path / "one", tiny(tmp_path / "one"), lines)
    other = write_run(tmp_path / "other", tiny(tmp_path / "other", "optimizer.lr=0.5"), [step_line(1, 2.5)])
    text, data = read_page(one, other)
    assert [run["name"] for run in data] == ["one", "other"]
    assert [points(curve_of(run, "Loss", "train, each step")) for run in data] == [[(1, 9.0 - 1 / 7)], [(1, 2.5)]]
    rows = dict(re.findall(r"<tr( class=\"differs\")?><th>([\w.]+)</th>", text)[i][::-1] for i in range(20))
    assert rows["optimizer.lr"], "a key of which runs differ is marked"
    assert not rows["seed"], "one that differs from its default alone is not"
    assert "<td>0.0006</td><td>0.01</td><td>0.5</td>" in text, "the default, then the runs"
    twice, again = write_run(tmp_path / "a" / "x", tiny(one), lines), write_run(tmp_path / "b" / "x", tiny(one), lines)
    assert [run["name"] for run in read_page(twice, again)[1]] == [str(twice), str(again)]


def test_other_objectives_probes_and_sources_have_charts(tiny: Tiny, tmp_path: Path) -> None:
    lines = [
        {"kind": "eval", "step": 4, "loss": 1.0, "score": 0.5, "sets": {"quora": {"mrr": 0.75, "num_pairs": 9}}},
        {
            "kind": "probe",
            "step": 4,
            "sets": {"sst2": {"knn": 0.5, "ridge": None}},
            "losses": {"word_length": {"1": 2.0}},
        },
        {"kind": "probe_ema", "step": 4, "sets": {"sst2": {"knn": 0.25}}, "losses": {}},
    ]
    _, (data,) = read_page(write_run(tmp_path / "run", tiny(tmp_path / "run"), [step_line(4), *lines]))
    assert points(curve_of(data, "Held-out: score", "score, held-out")) == [(4, 0.5)]
    assert points(curve_of(data, "Held-out: quora", "mrr, held-out")) == [(4, 0.75)]
    assert points(curve_of(data, "Probe: sst2", "knn")) == [(4, 0.5)]
    assert points(curve_of(data, "Probe: sst2", "knn, averaged weights")) == [(4, 0.25)]
    assert points(curve_of(data, "Probe: loss by word length", "1")) == [(4, 2.0)]


def test_a_growing_log_is_read_once_and_a_replaced_one_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_lines(path, [step_line(1), {"kind": "eval", "step": 1, "loss": 1.0}])
    log = RunLog(path)
    log.update()
    with path.open("a") as handle:
        handle.write("no json\n" + json.dumps(step_line(2)) + '\n{"kind": "step", "st')
    log.update()
    assert ([*log.steps["step"]], len(log.lines["eval"])) == ([1, 2], 1)
    with path.open("a") as handle:
        handle.write('ep": 3, "loss": NaN, "lr": true}\n')
    log.update()
    assert [*log.steps["step"]] == [1, 2, 3]
    assert np.isnan([log.steps["loss"][-1], log.steps["lr"][-1]]).all()
    write_lines(tmp_path / "new", [step_line(7)])
    os.replace(tmp_path / "new", path)
    log.update()
    assert ([*log.steps["step"]], log.lines, log.last_step) == ([7], {}, 7)


def test_the_tokens_of_a_log_that_starts_late_are_those_of_the_run(tiny: Tiny, tmp_path: Path) -> None:
    lines = [step_line(x) for x in range(101, 111)] + [interval_line(110, tokens=50_000)]
    _, (data,) = read_page(write_run(tmp_path / "run", tiny(tmp_path / "run"), lines))
    assert curve_of(data, "Loss", "train, each step")["tokens"] == [50_000 - 100 * (110 - x) for x in range(101, 111)]


def test_a_config_that_cannot_be_read_is_said_and_no_more(tiny: Tiny, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny(tmp_path / "run"), [step_line(1)])
    (run / "config.yaml").write_text("model: {no_such_key: <b>1</b>}")
    text, (data,) = read_page(run)
    assert "config.yaml cannot be read" in text
    assert "model.no_such_key: unknown key" in text
    assert data["charts"]


def test_the_command(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (write_run(tmp_path / name, tiny(tmp_path / name), [step_line(1)]) for name in ("one", "other"))
    report("neobert report", [str(one)])
    report("neobert report", [str(one), str(other)])
    report("neobert report", [str(one), str(other), "--output", str(tmp_path / "new" / "page.html")])
    written = [one / REPORT, one / "report" / "comparison.html", tmp_path / "new" / "page.html"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]
    assert [len(read_data(path.read_text())) for path in written] == [1, 2, 2]
    with pytest.raises(ReportError, match=r"nowhere holds no log.jsonl; name the output folder of a run"):
        report("neobert report", [str(one), str(tmp_path / "nowhere")])
    for path in (tmp_path, tmp_path / "page.png"):
        with pytest.raises(CallError, match=r"--output: .*; write the name of a file that ends with .html"):
            report("neobert report", [str(one), "--output", str(path)])
    with pytest.raises(CallError, match=r"--output FILE.html chooses another file"):
        report("neobert report", [str(one), "--output", str(one / "config.yaml" / "x.html")])


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_chart(scheme: str, width: int, tiny: Tiny, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright` and a Chromium")
    lines = [
        *map(step_line, range(1, 21)),
        interval_line(10),
        interval_line(20),
        {"kind": "eval", "step": 9, "loss": 2.0},
    ]
    events = [{"event": "skipped_step", "step": 5, "problem": EVIL}]
    runs = [write_run(tmp_path / name, tiny(tmp_path / name), lines, events) for name in ("one", EVIL.replace("/", ""))]
    _, data = read_page(*runs)
    said: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("NEOBERT_CHROMIUM"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        titles = {chart["title"] for run in data for chart in run["charts"]}
        for button in ("tokens", "training time", "log scale", "steps"):
            page.get_by_role("button", name=button, exact=True).click()
            assert page.locator("#charts canvas").count() == len(titles) > 5
        assert page.locator("#charts h2").all_inner_texts() == list(
            dict.fromkeys(chart["title"] for run in data for chart in run["charts"])
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "no scrolling to the side"
        assert (said, len(requests)) == ([], 1)
        browser.close()
