"""No secret of the environment or of the config reaches a log, an event or a tracker."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_run import FakeWandb, install

from neobert.config.fields import SECTIONS
from neobert.config.load import load_config
from neobert.config.schema import Config
from neobert.errors import DataError
from neobert.train.loop import pretrain
from neobert.train.record import tracking
from neobert.train.record.sinks import TRACKED_SECTIONS

Tiny = Callable[..., Config]
IN_URL, IN_ENVIRONMENT = "pa55word-in-url", "t0ken-in-environment"
LEAKY = ["wandb.enabled=true", f"model.name=https://me:{IN_URL}@host/{IN_ENVIRONMENT}"]


def test_logs_events_and_trackers_are_clean(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", IN_ENVIRONMENT)
    monkeypatch.delenv("WANDB_DISABLE_CODE", raising=False)
    fake, out = FakeWandb(), tmp_path / "run"
    install(monkeypatch, fake)
    # Whatever raises may quote a URL: here an incident of the run does.
    real = tracking.Tracker.event
    monkeypatch.setattr(
        tracking.Tracker, "event", lambda self, kind, step, **more: real(self, kind, step, **more, why=LEAKY[1])
    )
    pretrain(tiny(out, "trainer.max_steps=2", f"wandb.dir={tmp_path / 'wandb'}", *LEAKY))
    written = capsys.readouterr().out + str(fake.settings["config"])
    written += "".join((out / name).read_text() for name in ("training.log", "log.jsonl", "events.jsonl"))
    assert "https://<hidden:credentials>@host/<hidden:HF_TOKEN>" in written
    for secret in (IN_URL, IN_ENVIRONMENT):
        assert secret not in written
    assert "wandb" not in fake.settings["config"], "its own section is not part of what is sent"
    assert fake.settings["config"]["trainer"]["max_steps"] == 2
    assert os.environ["WANDB_DISABLE_CODE"] == "true"


def test_a_choice_about_code_is_respected(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLE_CODE", "false")
    install(monkeypatch, FakeWandb())
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=1", f"wandb.dir={tmp_path / 'wandb'}", "wandb.enabled=true"))
    assert os.environ["WANDB_DISABLE_CODE"] == "false"


def test_the_list_of_tracked_sections_is_up_to_date() -> None:
    assert {*TRACKED_SECTIONS} | {"wandb"} == {name for name in SECTIONS if "." not in name} | {"task", "seed"}


def test_a_failing_tracker_does_not_quote_its_key(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb()
    install(monkeypatch, fake)
    error = ConnectionError(f"401 for https://api:{IN_URL}@wandb.example")
    monkeypatch.setattr(fake, "init", lambda **settings: (_ for _ in ()).throw(error))
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=1", "wandb.enabled=true", f"wandb.dir={tmp_path / 'wandb'}"))
    assert "401 for https://<hidden:credentials>@wandb.example" in capsys.readouterr().out


def test_the_printed_config_of_a_start_that_fails_is_clean(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError):
        pretrain(tiny(tmp_path / "run", f"dataset.path=https://me:{IN_URL}@host/data.jsonl"))
    assert "path=https://<hidden:credentials>@host/data.jsonl" in capsys.readouterr().out
    assert IN_URL not in (tmp_path / "run" / "training.log").read_text()


def test_a_path_that_holds_the_value_of_a_secret_variable_is_saved_and_resumed(
    tiny: Tiny, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_KEY", str(corpus)[1:])
    monkeypatch.setenv("DB_PASSWORD", corpus.name)
    out = tmp_path / "run"
    config = tiny(out, "trainer.max_steps=1")
    pretrain(config)
    assert load_config(out / "config.yaml") == config
    assert f"path={corpus}" in (out / "training.log").read_text()
    resume = ["trainer.resume_from_checkpoint=latest", "trainer.max_steps=2"]
    assert pretrain(load_config(out / "config.yaml", resume)).state.step == 2
