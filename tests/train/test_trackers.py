"""Trackers get what `log.jsonl` has, continue it on a resume, and never stop a run.

The first tests replace a tracker. The last ones run the packages that are installed (extras wandb, tensorboard, trackio
and mlflow) and read their files back with their own readers.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from records import log_lines
from test_run import FakeWandb, install

from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.config.schema_trainer import TRACKER_NAMES
from neobert.errors import StartupError
from neobert.train.build import build_sinks
from neobert.train.hardware import machine
from neobert.train.loop import pretrain
from neobert.train.record import trackers
from neobert.train.record.trackers import TRACKERS, TrackerSink

Tiny = Callable[..., Config]
Values = dict[tuple[str, int], float]
MIXED = ["dataset.path=null", "dataset.eval_samples=4"]


class FakeSink(TrackerSink):
    """Records what a run sends, and raises where it is told to."""

    name = "tensorboard"
    failing: str | None = None
    calls: list[tuple[str, int]]
    values: Values

    def _act(self, what: str, step: int) -> None:
        self.calls.append((what, step))
        if what == self.failing:
            raise ConnectionError("no route to https://me:pa55word@host")

    def begin(self, step: int) -> None:
        self._act("begin", step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._act("log", step)
        self.values |= {(name, step): value for name, value in values.items()}

    def close(self) -> None:
        self._act("close", 0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeSink]:
    """A tracker in the place of tensorboard."""

    class Fake(FakeSink):
        calls, values = [], {}

    monkeypatch.setitem(TRACKERS, "tensorboard", Fake)
    for module in (machine, trackers):
        monkeypatch.setattr(module, "is_installed", lambda name: name == "tensorboard")
    return Fake


def recorded(output_dir: Path) -> Values:
    """Every number of `log.jsonl` but those of single steps, by the name that trackers have for it."""

    def numbers(prefix: str, line: Mapping[str, Any], step: int) -> Values:
        found: Values = {}
        for name, value in line.items():
            if isinstance(value, dict):
                found |= numbers(f"{prefix}/{name}", value, step)
            elif type(value) in (int, float) and name != "step":
                found[f"{prefix}/{name}", step] = value
        return found

    kinds = {"log": "train", "eval": "eval", "eval_ema": "eval_ema"}
    lines = [(name, line) for kind, name in kinds.items() for line in log_lines(output_dir, kind)]
    return {key: x for name, line in lines for key, x in numbers(name, line, line["step"]).items()}


def test_the_table_has_what_the_key_can_name() -> None:
    assert tuple(TRACKERS) == TRACKER_NAMES


def test_a_tracker_gets_every_number_of_the_log(tiny: Tiny, tmp_path: Path, fake: type[FakeSink]) -> None:
    out = tmp_path / "run"
    more = ["trainer.report_to=all", "trainer.ema_decay=0.9", "trainer.log_statistics=true"]
    pretrain(tiny(out, "trainer.max_steps=7", *more))
    assert fake.calls[0] == ("begin", 0)
    assert fake.calls[-1] == ("close", 0)
    expected = recorded(out)
    assert {name.partition("/")[0] for name, _ in expected} == {"train", "eval", "eval_ema"}
    assert ("train/tokens_per_second", 6) in expected
    assert ("train/weight_norm/qkv", 6) in expected
    assert {key: fake.values.get(key) for key in expected} == expected
    assert fake.values["train/perplexity", 6] == pytest.approx(math.exp(expected["train/loss", 6]))


def test_a_resumed_run_continues_the_trackers(tiny: Tiny, tmp_path: Path, fake: type[FakeSink]) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=6", "trainer.report_to=tensorboard"))
    del fake.calls[:]
    pretrain(tiny(out, "trainer.max_steps=8", "trainer.report_to=[tensorboard]", "trainer.resume_from_checkpoint=4"))
    assert fake.calls[0] == ("begin", 4)
    assert {step for what, step in fake.calls if what == "log"} == {6, 8}
    assert {key: fake.values.get(key) for key in recorded(out)} == recorded(out)


def test_wandb_resumes_its_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, first, second = tmp_path / "run", FakeWandb(), FakeWandb()
    keys = ["trainer.report_to=[wandb]", "wandb.resume=allow", f"wandb.dir={tmp_path / 'wandb'}", "wandb.mode=offline"]
    install(monkeypatch, first)
    pretrain(tiny(out, "trainer.max_steps=1", *keys))
    assert (first.settings["id"], first.settings["resume"]) == (None, "allow")
    install(monkeypatch, second)
    pretrain(tiny(out, "trainer.max_steps=2", *keys, "trainer.resume_from_checkpoint=latest"))
    assert (second.settings["id"], second.settings["resume"], second.settings["mode"]) == ("abc123", "allow", "offline")
    assert {step for _, step in second.sent} == {2}


@pytest.mark.parametrize(("failing", "says"), [("begin", "did not start"), ("log", "failed"), ("close", "failed")])
def test_a_tracker_that_raises_is_left_out_and_said_once(
    tiny: Tiny,
    tmp_path: Path,
    fake: type[FakeSink],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
    says: str,
) -> None:
    monkeypatch.setattr(fake, "failing", failing)
    out = tmp_path / "run"
    assert pretrain(tiny(out, "trainer.max_steps=7", "trainer.report_to=tensorboard")).reason == "finished"
    assert capsys.readouterr().out.count(f"tensorboard {says} (no route to https://<hidden:credentials>@host)") == 1
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["event"] == "tracker_failed")
    assert event["tracker"] == "tensorboard"
    assert event["problem"] == "ConnectionError: no route to https://<hidden:credentials>@host"
    assert [what for what, _ in fake.calls].count(failing) == 1
    assert len(log_lines(out, "step")) == 7


def test_only_the_first_process_reports(tiny: Tiny, tmp_path: Path, fake: type[FakeSink]) -> None:
    config, said = tiny(tmp_path, "trainer.report_to=tensorboard"), []
    reporter: Any = SimpleNamespace(warn=said.append)
    kinds = [
        [type(sink) for sink in build_sinks(config, SimpleNamespace(is_main=main), tmp_path, None, reporter)]  # type: ignore[arg-type]
        for main in (True, False)
    ]
    assert kinds == [[fake], []]
    assert not said


def test_all_without_any_installed_is_said(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(trackers, "is_installed", lambda name: False)
    runtime: Any = SimpleNamespace(is_main=True)
    reporter: Any = SimpleNamespace(warn=said.append)
    assert build_sinks(tiny(tmp_path, "trainer.report_to=all"), runtime, tmp_path, None, reporter) == []  # type: ignore[arg-type]
    assert said == ["trainer.report_to: all finds none installed of wandb, tensorboard, trackio, mlflow"]
    assert build_sinks(tiny(tmp_path, "trainer.report_to=none"), runtime, tmp_path, None, reporter) == []  # type: ignore[arg-type]
    assert len(said) == 1


def test_a_tracker_that_is_not_installed_stops_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda name: name == "wandb")
    with pytest.raises(StartupError, match=r"report_to: \[wandb, mlflow\], but the package mlflow .*'\.\[mlflow\]'"):
        pretrain(tiny(tmp_path / "run", "trainer.report_to=[wandb, mlflow]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ([], ()),
        (["wandb.enabled=true"], ("wandb",)),
        (["trainer.report_to=none"], ()),
        (["trainer.report_to=[]"], ()),
        (["trainer.report_to=[none]"], ()),
        (["trainer.report_to=all", "wandb.enabled=true"], ("all",)),
        (["trainer.report_to=MLflow"], ("mlflow",)),
        (["trainer.report_to=[wandb, trackio]", "wandb.enabled=true"], ("wandb", "trackio")),
    ],
)
def test_how_trackers_are_named(tiny: Tiny, tmp_path: Path, keys: list[str], names: tuple[str, ...]) -> None:
    assert tiny(tmp_path, *keys).requested_trackers == names


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["trainer.report_to=none", "wandb.enabled=true"], ["wandb.enabled: true", "trainer.report_to: [none]"]),
        (["trainer.report_to=[mlflow]", "wandb.enabled=true"], ["wandb.enabled: true", "trainer.report_to: [mlflow]"]),
        (["trainer.report_to=comet"], ["trainer.report_to: 'comet' is not", "one of none, all, wandb"]),
        (["trainer.report_to=[comet]"], ["trainer.report_to: 'comet' is not one of none, all, wandb"]),
        (["trainer.report_to=[all, wandb]"], ["trainer.report_to: [all, wandb] has all beside other names"]),
    ],
)
def test_names_that_cannot_be_meant(tiny: Tiny, tmp_path: Path, keys: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(tmp_path, *keys)
    assert all(part in str(caught.value) for part in parts)


# ---- with the packages ----


def run_twice(tiny: Tiny, out: Path, name: str, *keys: str) -> Values:
    """Seven steps, then a resume from the fourth; what the log has then. A secret is in the config."""
    keys = (f"trainer.report_to=[{name}]", "model.name=https://me:pa55word@host/small", "wandb.project=tests", *keys)
    pretrain(tiny(out, "trainer.max_steps=7", *keys))
    pretrain(tiny(out, "trainer.max_steps=9", *keys, "trainer.resume_from_checkpoint=4"))
    events = (out / "events.jsonl").read_text()
    assert "tracker_failed" not in events, events
    return recorded(out)


def assert_no_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"pa55word" in path.read_bytes()]


def test_tensorboard_reads_the_curves_of_the_log(tiny: Tiny, tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    expected = run_twice(tiny, tmp_path / "run", "tensorboard")
    folder = tmp_path / "run" / "tensorboard"
    curves = reading.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = [((tag, x.step), x.value) for tag in curves.Tags()["scalars"] for x in curves.Scalars(tag)]
    assert len(found) == len(dict(found)), "steps that were made again replace the first ones"
    rounded = {key: float(np.float32(value)) for key, value in expected.items()}  # What the files hold.
    assert {key: dict(found).get(key) for key in expected} == rounded
    assert "trainer.max_steps: 7" in next(folder.glob("*/hparams.yml")).read_text()
    assert_no_secret(folder)


def test_trackio_reads_the_curves_of_the_log(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read when it is imported.
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    expected = run_twice(tiny, tmp_path / "run", "trackio")
    (run,) = SQLiteStorage.get_run_records("tests")
    assert run["name"] == (tmp_path / "run" / "trackio_id.txt").read_text().strip()
    found = {
        (name, line["step"]): x for line in SQLiteStorage.get_logs("tests", run["name"]) for name, x in line.items()
    }
    assert {key: found.get(key) for key in expected} == expected
    assert SQLiteStorage.get_run_config("tests", run["name"])["trainer.max_steps"] == 9
    assert_no_secret(tmp_path / "trackio")


def test_mlflow_reads_the_curves_of_the_log(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow = pytest.importorskip("mlflow")
    expected = run_twice(tiny, tmp_path / "run", "mlflow")
    client, run_id = mlflow.MlflowClient(), (tmp_path / "run" / "mlflow_id.txt").read_text().strip()
    run = client.get_run(run_id)
    found = {(name, x.step): x.value for name in run.data.metrics for x in client.get_metric_history(run_id, name)}
    assert {key: found.get(key) for key in expected} == expected
    assert run.data.params["trainer.max_steps"] == "7"
    assert run.info.status == "FINISHED"
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    assert b"pa55word" not in (tmp_path / "mlflow.db").read_bytes()


def read_wandb(file: Path) -> list[Any]:
    """The records of an offline run, in wandb's own type: a log of LevelDB, blocks of 32 KiB with parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, part, found = file.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, offset)
        part += data[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # A whole record, or the end of one.
            found.append(Record.FromString(part))
            part = b""
    return found


def test_wandb_reads_the_curves_of_the_log(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    keys = ("wandb.mode=offline", "wandb.resume=allow", f"wandb.dir={tmp_path / 'logs'}")
    expected = run_twice(tiny, tmp_path / "run", "wandb", *keys)
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    files = sorted((tmp_path / "logs").glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2, "both starts are of one run"
    found: Values = {}
    for file in files:
        for record in read_wandb(file):
            items = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
            found |= {(name, items["_step"]): x for name, x in items.items()}
    assert {key: found.get(key) for key in expected} == expected
    assert_no_secret(tmp_path / "logs")
    kept = [path for path in (tmp_path / "logs").rglob("*") if path.suffix in (".py", ".patch")]
    assert not kept, "no code, and no difference from what is committed"
