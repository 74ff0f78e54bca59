"""Rules about schedules and masks: each wrong config has one sentence with key, value and remedy."""

from dataclasses import replace
from typing import Any

import pytest

from neobert.config.load import ConfigError, parse_config
from neobert.config.rules import validate, warnings
from neobert.config.schema import Config


def config(*overrides: str) -> Config:
    return parse_config("trainer: {max_steps: 1000}\ndataset: {path: x}\ntokenizer: {path: y}\n", overrides)


WRONG: list[tuple[list[str], str]] = [
    (["scheduler.cooldown_steps=10"], "scheduler.cooldown_steps: 10 has no effect with scheduler.name: cosine"),
    (["scheduler.name=linear", "scheduler.cooldown_percent=5"], "scheduler.cooldown_percent: 5.0 has no effect"),
    (["scheduler.name=wsd"], "scheduler.cooldown_percent: null, but scheduler.name: wsd needs the length of its decay"),
    (["scheduler.name=wsd", "scheduler.cooldown_steps=0"], "scheduler.cooldown_steps: 0 must be at least 1"),
    (
        ["scheduler.name=wsd", "scheduler.cooldown_percent=101"],
        "scheduler.cooldown_percent: 101.0 must be greater than 0 and at most 100",
    ),
    (["scheduler.name=constant", "scheduler.decay_steps=9000"], "scheduler.decay_steps: 9000 has no effect"),
    (["scheduler.name=inverse_sqrt", "scheduler.decay_percent=50"], "scheduler.decay_percent: 50.0 has no effect"),
    (["scheduler.cooldown_shape=linear"], "scheduler.cooldown_shape: linear has no effect with scheduler.name: cosine"),
    (
        ["scheduler.name=wsd", "scheduler.cooldown_percent=60", "scheduler.warmup_percent=50"],
        "scheduler.cooldown_percent: 60.0 + scheduler.warmup_percent = 50.0 is more than the end of the decay, 100",
    ),
    (
        ["scheduler.name=wsd", "scheduler.cooldown_steps=60", "scheduler.warmup_steps=50", "scheduler.decay_steps=100"],
        "scheduler.cooldown_steps: 60 + scheduler.warmup_steps = 50 is more than scheduler.decay_steps = 100",
    ),
    (
        ["trainer.batch_size_warmup_start=16"],
        "trainer.batch_size_warmup_start: 16 has no effect without trainer.batch_size_warmup_steps; set that",
    ),
    (
        ["trainer.batch_size_warmup_steps=9"],
        "trainer.batch_size_warmup_steps: 9 has no effect without trainer.batch_size_warmup_start; set",
    ),
    (
        ["trainer.batch_size_warmup_steps=9", "trainer.batch_size_warmup_start=20"],
        "trainer.batch_size_warmup_start: 20 is not a multiple of trainer.per_device_train_batch_size = 16; write 32",
    ),
    (
        [
            "trainer.batch_size_warmup_steps=9",
            "trainer.batch_size_warmup_start=32",
            "trainer.global_batch_size=32",
        ],
        "trainer.batch_size_warmup_start: 32 rows are no fewer than trainer.global_batch_size = 32",
    ),
    (["datacollator.mlm_probability_final=0"], "datacollator.mlm_probability_final: 0.0 must be greater than 0"),
    (
        ["datacollator.mlm_probability_final_step=9"],
        "datacollator.mlm_probability_final_step: 9 has no effect without datacollator.mlm_probability_final",
    ),
    (["datacollator.mask_fraction=1.2"], "datacollator.mask_fraction: 1.2 must be from 0 to 1"),
    (
        ["datacollator.mask_fraction=0.9", "datacollator.random_fraction=0.2"],
        "datacollator.random_fraction: 0.2 + datacollator.mask_fraction = 0.9 is more than 1",
    ),
    (
        ["datacollator.mask_fraction=0", "datacollator.random_fraction=0"],
        "datacollator.mask_fraction: 0 beside datacollator.random_fraction = 0 keeps every predicted token",
    ),
    (
        ["datacollator.mask_all=true", "datacollator.random_fraction=0"],
        "datacollator.random_fraction: 0.0 has no effect with datacollator.mask_all: true",
    ),
    (
        ["datacollator.mask_units=words", "datacollator.span_max_words=3"],
        "datacollator.span_max_words: 3 has no effect with datacollator.mask_units: words; remove it, or write",
    ),
    (
        ["datacollator.mask_weights=adaptive", "datacollator.mask_units=words"],
        "datacollator.mask_weights: adaptive has no effect with datacollator.mask_units: words; remove it, or write",
    ),
    (
        ["datacollator.mask_weights=adaptive", "trainer.objective=replaced_token"],
        "datacollator.mask_weights: adaptive has no effect with trainer.objective: replaced_token; remove it, or write",
    ),
    (
        ["datacollator.mask_weights=adaptive", "trainer.parallel=hsdp"],
        "trainer.parallel: hsdp shards the weights, and datacollator.mask_weights: adaptive asks the whole model which",
    ),
    (["datacollator.mask_weights=adaptive", "datacollator.mask_weights_steps=1"], "mask_weights_steps: 1 must be at"),
    (["datacollator.mask_weights_steps=9"], "mask_weights_steps: 9 has no effect with datacollator.mask_weights: unif"),
]


@pytest.mark.parametrize(("overrides", "sentence"), WRONG, ids=lambda x: x[0] if isinstance(x, list) else None)
def test_wrong(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    lines = [line for line in str(caught.value).splitlines() if sentence in line]
    assert len(lines) == 1, caught.value


RIGHT: list[list[str]] = [
    ["scheduler.name=constant", "scheduler.final_lr_ratio=0", "scheduler.cooldown_shape=linear"],
    ["scheduler.name=constant", "scheduler.cooldown_steps=100", "scheduler.final_lr_ratio=0"],
    ["scheduler.name=inverse_sqrt", "scheduler.final_lr_ratio=0"],
    ["scheduler.name=inverse_sqrt", "scheduler.cooldown_percent=10", "scheduler.cooldown_shape=cosine"],
    ["scheduler.name=wsd", "scheduler.cooldown_percent=10", "scheduler.decay_percent=90"],
    ["scheduler.name=wsd", "scheduler.cooldown_percent=90", "scheduler.warmup_percent=10"],
    ["trainer.batch_size_warmup_steps=9", "trainer.batch_size_warmup_start=16", "trainer.global_batch_size=48"],
    ["datacollator.mlm_probability=0.3", "datacollator.mlm_probability_final=0.15"],
    ["datacollator.mask_fraction=0.7", "datacollator.random_fraction=0.3"],
    ["datacollator.mask_weights=adaptive", "datacollator.mask_weights_steps=2", "datacollator.mlm_rate=random"],
    ["datacollator.mask_all=true", "datacollator.mask_units=spans", "datacollator.span_max_words=3"],
]


@pytest.mark.parametrize("overrides", RIGHT, ids=lambda x: x[0])
def test_right(overrides: list[str]) -> None:
    short_warmup = ["scheduler.warmup_steps=10"]
    right = config(*short_warmup, *overrides)
    assert validate(right) == []
    assert warnings(right) == []


def test_a_cooldown_that_does_not_fit_is_a_warning() -> None:
    settings = ["scheduler.name=wsd", "scheduler.warmup_steps=100", "scheduler.cooldown_steps=950"]
    (found,) = warnings(config(*settings))
    assert found.startswith(
        "scheduler.cooldown_steps: 950, but there are only 900 steps between the warm-up and the end"
    )
    assert warnings(config(*settings), total_steps=2000) == []


def test_a_schedule_without_an_end_needs_no_warning() -> None:
    long: dict[str, Any] = {"name": "constant", "warmup_steps": 10, "total_steps": 5000}
    plain = config("scheduler.warmup_steps=10")
    assert warnings(replace(plain, scheduler=replace(plain.scheduler, **long))) == []
