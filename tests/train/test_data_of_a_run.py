"""What a run does with its data: mixtures in the log, readers closed for evaluations, warnings about slow settings."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from records import log_lines

from neobert.config.load import config_to_yaml, load_config, parse_config, without_secrets
from neobert.config.schema import Config
from neobert.config.schema_data import MixtureSource
from neobert.train.loop import pretrain
from neobert.train.pretraining import slow_reading

Tiny = Callable[..., Config]
RESUME = "trainer.resume_from_checkpoint=latest"


def mixture(corpus: Path) -> str:
    parts = [
        {"path": str(corpus / "part-0.jsonl"), "weight": 3},
        {"path": str(corpus / "part-1.jsonl.gz"), "weight": 1},
    ]
    return json.dumps(parts)


def test_a_mixture_trains_resumes_and_reports_tokens_by_source(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    settings = ["dataset.path=null", f"dataset.mixture={mixture(corpus)}", "trainer.logging_steps=4"]
    pretrain(tiny(tmp_path / "whole", *settings))
    logs = log_lines(tmp_path / "whole", "log")
    for line in logs:
        first, second = line["source_tokens"].values()
        assert 0.5 < first / (first + second) < 0.95
    steps = log_lines(tmp_path / "whole", "step")
    assert sum(sum(line["source_tokens"].values()) for line in logs) == sum(line["num_tokens"] for line in steps)
    pretrain(tiny(tmp_path / "cut", *settings, "trainer.max_steps=4", "scheduler.total_steps=12"))
    pretrain(tiny(tmp_path / "cut", *settings, "trainer.resume_from_checkpoint=latest"))
    again = log_lines(tmp_path / "cut", "step")
    assert [line["batch_digest"] for line in again] == [line["batch_digest"] for line in steps]
    assert "tokens by source: " in (tmp_path / "whole" / "training.log").read_text()


def test_readers_closed_for_evaluations_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("true", "false"):
        pretrain(tiny(tmp_path / name, f"dataset.persistent_workers={name}", "dataset.num_workers=2"))
    lines = [log_lines(tmp_path / name, "step") for name in ("true", "false")]
    assert lines[0] == lines[1]


def test_tokenising_before_a_run_goes_where_configured(tiny: Tiny, tmp_path: Path) -> None:
    settings = ["dataset.pre_tokenize=true", f"dataset.pre_tokenize_output={tmp_path / 'tokens'}"]
    pretrain(tiny(tmp_path / "run", *settings, "trainer.max_steps=2"))
    assert (tmp_path / "tokens" / "train" / "manifest.json").is_file()
    assert not (tmp_path / "run" / "tokenized").exists()


SLOW = [
    ("dataset.num_workers=0", "dataset.num_workers: 0"),
    ("dataset.prefetch_factor=1", "dataset.prefetch_factor: 1"),
    ("dataset.pin_memory=false", "dataset.pin_memory: false"),
]


@pytest.mark.parametrize(("override", "sentence"), SLOW)
def test_slow_settings_are_warned_about_on_a_gpu(override: str, sentence: str) -> None:
    base = ["dataset.name=python_stdlib", "tokenizer.train=true", "trainer.max_steps=1"]
    (found,) = slow_reading(load_config(None, [*base, override]), "cuda")
    assert found.startswith(sentence)
    assert slow_reading(load_config(None, [*base, override]), "cpu") == []
    assert slow_reading(parse_config("", base), "cuda") == []


def test_a_run_continues_with_a_mixture_and_says_so(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=4"))
    pretrain(tiny(tmp_path / "run", "dataset.path=null", f"dataset.mixture={mixture(corpus)}", RESUME))
    log = (tmp_path / "run" / "training.log").read_text()
    assert "dataset.mixture" in log
    assert "the data order starts at the first row of the new source" in log


def test_an_address_in_a_mixture_is_saved_without_its_password(tiny: Tiny, tmp_path: Path) -> None:
    source = MixtureSource(path="https://user:hush@host/a.jsonl")
    config = tiny(tmp_path / "run")
    saved = config_to_yaml(without_secrets(replace(config, dataset=replace(config.dataset, mixture=(source,)))))
    assert "host/a.jsonl" in saved
    assert "hush" not in saved
