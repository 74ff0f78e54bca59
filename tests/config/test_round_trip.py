"""Saving a config and loading it again gives an equal config."""

import os
import random
from typing import Any, get_args, get_origin

import pytest

from neobert.config import source
from neobert.config.fields import COUNT_OR_AUTO, FIELDS, TEXTS, Field, can_be_declared
from neobert.config.load import build_config, config_to_yaml, load_config, parse_config, save_config
from neobert.config.nesting import compose
from neobert.config.rules import BUDGETS, validate
from neobert.config.schema import Config
from neobert.config.schema_contrastive import PairSource
from neobert.config.schema_data import MixtureSource
from neobert.config.schema_trainer import TRACKER_NAMES

NASTY = [
    "none",
    "null",
    "~",
    "no",
    "True",
    "012",
    "1e5",
    "1e-4",
    " a ",
    "a: b",
    "- a",
    "# a",
    "'",
    '"',
    "a\nb\n",
    "é漢😀",
]
NASTY += [
    "???",
    "${x",
    "${oc.env:HOME}",
    "$variables.x",
    "${variables.x}",
    "{$variables.x}",
    "$$variables.x",
    "a$${variables.b}",
]
NASTY += [
    "x" * 300,
    "word " * 60,
    "@a",
    "%a",
    "*a",
    "&a",
    "!a",
    "=",
    "<<",
    "2023-11-01",
    "1:30",
    ".inf",
    "\t",
    "a\\nb",
    "\x85",
    "{a}",
]

VALID = {"dataset.name": "python_stdlib", "tokenizer.train": True, "trainer.max_steps": 1000}

CONTRASTIVE = {
    "task": "contrastive",
    "dataset.path": "tokenized_data/contrastive",
    "trainer.max_steps": 1000,
    "contrastive.pretrained_checkpoint_dir": "outputs/x",
    "contrastive.pretraining_prob": 0.2,
    "contrastive.pretraining_dataset": "texts.jsonl",
    "model.dropout_prob": 0.1,
}

LABELS = {
    "task": "finetune",
    "dataset.path": "rows.jsonl",
    "trainer.max_steps": 1000,
    "finetune.model": "outputs/x",
}

GLUE = {"task": "glue", "glue.model": "outputs/x"}

DISTILLED = {
    **VALID,
    "trainer.objective": "distill",
    "distill.teacher": "outputs/teacher",
    "tokenizer.train": False,
    "datacollator.mlm_rate": "random",
    "model.local_attention": 128,
}
STARTS = (CONTRASTIVE, LABELS, GLUE, VALID, VALID, DISTILLED)


def random_value(field: Field, rng: random.Random) -> Any:
    if field.nullable and rng.random() < 0.2:
        return None
    if field.choices:
        return rng.choice(field.choices)
    if field.kind == COUNT_OR_AUTO:
        return rng.choice(["auto", 1, 8, 64])
    if field.kind == TEXTS:
        return rng.choice([rng.choice(NASTY), tuple(rng.choices(NASTY, k=rng.randint(1, 3)))])
    if field.key == "dataset.mixture":
        return tuple(
            MixtureSource(path=rng.choice(NASTY) or "a", weight=0.5 + rng.random(), max_documents=rng.choice([None, 7]))
            for _ in range(rng.randint(0, 3))
        )
    if field.key in ("contrastive.sets", "contrastive.eval_sets"):
        columns = rng.choice([None, "negative", ("a", "b")])
        return tuple(
            PairSource(name=rng.choice(NASTY) or "a", negative_columns=columns, max_pairs=rng.choice([None, 7]))
            for _ in range(rng.randint(0, 3))
        )
    if get_origin(field.kind) is tuple:
        item, *rest = get_args(field.kind)
        if field.key == "trainer.resume_allow":
            return tuple(rng.sample([key for key, field in FIELDS.items() if can_be_declared(field)], 2))
        if field.key == "trainer.report_to":
            return rng.choice([(), ("none",), ("all",), ("wandb", *rng.sample(TRACKER_NAMES[1:], 2))])
        if rest == [...] and item is float:
            return tuple(rng.uniform(1e-6, 1) for _ in range(rng.randint(0, 3)))
        if rest == [...] and item is int:
            return tuple(rng.randint(1, 10**6) for _ in range(rng.randint(0, 3)))
        if rest == [...]:
            return tuple(f"{rng.choice(NASTY)}[MASK]" for _ in range(rng.randint(0, 3)))
        return tuple(rng.random() for _ in range(1 + len(rest)))
    if field.kind is bool:
        return rng.random() < 0.5
    if field.kind is int:
        return rng.choice([0, 1, 2, 8, 64, 768, 1024, rng.randrange(10**12)])
    if field.kind is float:
        return rng.choice([0.0, 1.0, 1e-8, 1e5, 1e22, rng.random(), rng.random() * 1e-9, rng.random() * 100])
    return os.path.expanduser(rng.choice(NASTY))  # Keys of folders are saved with the home folder instead of "~".


def assert_round_trip(config: Config) -> None:
    text = config_to_yaml(config)
    assert parse_config(text) == config, text


WRITTEN = {
    "of every kind": "a: 1\nb: 'no'\nc: no\nd: [x, {e: ~}, 012, 1e5]\nf: \"${x}\"\ng: |\n  h\n  i\nj:\n",
    "anchors": "a: &a {b: [1, 2]}\nc: *a\nd: [*a, *a]\n",
    "a list": "[a, 'b', [c]]",
    "names in quotes": "'1': a\n\"no\": b\n'<<': c\n",
    "nothing in it": "a: {}\nb: []\nc: ''\n",
    "texts": config_to_yaml(build_config({**VALID, "wandb.tags": tuple(NASTY), "wandb.name": NASTY[0]})),
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_a_plain_text_is_read_as_with_omegaconf(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = source._parse_once.__wrapped__(text)
    asked: list[object] = []
    monkeypatch.setattr(source, "_is_plain", lambda node: bool(asked.append(node)))
    assert plain == source._parse_once.__wrapped__(text)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "text", ["a: {<<: {b: 1}}", "a: 1\na: 2", "1: a", "a: [{no: b}]", "a: !!set {b}", "a: 2023-11-01", "[a]: b"]
)
def test_the_rest_is_left_to_omegaconf(text: str) -> None:
    node = compose(text)
    assert node is not None
    assert not source._is_plain(node)


def test_random_valid_configs_round_trip():
    rng = random.Random(0)
    accepted = set()
    for number in range(50):
        start = STARTS[number % len(STARTS)]
        values = {**start, "optimizer.name": rng.choice(FIELDS["optimizer.name"].choices)}
        # Half of them at random, half of those that no value was accepted for yet.
        rare = [key for key in sorted(FIELDS) if key not in accepted]
        for key in dict.fromkeys([*rng.sample(rare, min(25, len(rare))), *rng.sample(sorted(FIELDS), 25)]):
            value = random_value(FIELDS[key], rng)
            if key not in BUDGETS and not validate(build_config({**values, key: value})):
                values[key] = value
                accepted.add(key)
        assert_round_trip(build_config(values))
    # almost every field has a value that is not its default
    assert len(accepted) >= len(FIELDS) - 8, sorted(set(FIELDS) - accepted)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_round_trips(text):
    config = build_config({**VALID, "wandb.name": text, "wandb.project": text, "wandb.tags": (text, text)})
    assert_round_trip(config)


@pytest.mark.parametrize("step", ["latest", "1000", "a/b/checkpoints/7"])
def test_resume_round_trips(step):
    assert_round_trip(build_config({**VALID, "trainer.resume_from_checkpoint": step}))


@pytest.mark.parametrize("budget", [{"trainer.max_tokens": 10**15}, {"trainer.num_train_epochs": 0.1}])
def test_budgets_round_trip(budget):
    assert_round_trip(build_config({**VALID, "trainer.max_steps": None, **budget}))


def test_a_saved_file_loads_and_takes_overrides(tmp_path):
    config = build_config(VALID)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    changed = load_config(tmp_path / "config.yaml", ["--trainer.max_tokens", "5000", "seed=3"])
    assert (changed.trainer.max_steps, changed.trainer.max_tokens, changed.seed) == (None, 5000, 3)


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        build_config(VALID).seed = 3  # type: ignore[misc]
