"""What a key says of itself at its field, and that every key says it."""

from dataclasses import dataclass

import pytest

from neobert.config.fields import FIELDS, can_be_declared, list_fields, list_keys
from neobert.config.load import build_config
from neobert.config.rules import validate
from neobert.key import RESUME, Condition, key, when


@dataclass
class _Section:
    plain: int = 3
    """A field like any other."""


VALID = {"dataset.name": "python_stdlib", "tokenizer.train": True, "trainer.max_steps": 100}


def test_every_key_has_a_class() -> None:
    for name, field in FIELDS.items():
        assert field.known.classes, name
        assert set(field.known.classes) <= set(RESUME), name


def test_a_field_without_a_class_is_refused_where_the_schema_is_read() -> None:
    with pytest.raises(TypeError, match="resume"):
        key(3)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match=r"_Section.plain: write it with neobert.key.key\(default, resume=...\)"):
        list_fields(_Section)


def test_every_condition_names_a_key_and_its_values() -> None:
    conditions = [need for field in FIELDS.values() for need in field.needs]
    conditions += [f.known.resume.condition for f in FIELDS.values() if not isinstance(f.known.resume, str)]
    assert len(conditions) > 50
    for condition in conditions:
        for name, values in condition.alternatives:
            field = FIELDS[name]
            allowed = {"true", "false"} if field.kind is bool else set(field.choices)
            assert set(values) <= allowed | ({"null"} if field.nullable else set()), condition


def test_conditions() -> None:
    values = {"a": None, "b": 0.1, "c": "x", "d": False}
    assert [Condition.parse(name).holds(values.__getitem__) for name in "abcd"] == [False, True, True, False]
    either = Condition.parse("c=y|z or d=true")
    assert not either.holds(values.__getitem__)
    assert either.holds({**values, "d": True}.__getitem__)
    assert either.holds({**values, "c": "z"}.__getitem__)
    assert either.reason(values.__getitem__) == "with c: x and d: false"
    assert either.remedy == "remove it, or write c: y or z or d: true"
    assert Condition.parse("a").reason(values.__getitem__) == "without a"


def test_a_class_may_depend_on_other_keys() -> None:
    known = FIELDS["trainer.per_device_train_batch_size"].known
    rows = {"model.dropout_prob": 0.0, "trainer.enforce_full_packed_batches": True}
    assert known.choose_class(rows.__getitem__) == "free"
    assert known.choose_class({**rows, "model.dropout_prob": 0.1}.__getitem__) == "declared"
    assert known.choose_class({**rows, "trainer.enforce_full_packed_batches": False}.__getitem__) == "declared"
    assert when("a", "declared", otherwise="fixed").otherwise == "fixed"


def test_what_can_be_declared() -> None:
    declared = {name for name, field in FIELDS.items() if can_be_declared(field)}
    assert {"seed", "dataset.mixture", "trainer.z_loss", "model.max_position_embeddings"} <= declared
    assert declared.isdisjoint({"dataset.path", "model.hidden_size", "optimizer.lr", "trainer.save_steps", "task"})
    assert {"dataset.eval_samples", "contrastive.eval_sets"} <= list_keys("evaluation") <= declared


@pytest.mark.parametrize(
    ("changes", "errors"),
    [
        ({"trainer.ema_start_step": 3}, ["trainer.ema_start_step: 3 has no effect without trainer.ema_decay; set"]),
        ({"trainer.ema_start_step": 3, "trainer.ema_decay": 0.9}, []),
        (
            {"scheduler.name": "constant", "scheduler.warmup_steps": 1, "scheduler.decay_steps": 9},
            ["scheduler.decay_steps: 9 has no effect with scheduler.name: constant and scheduler.cooldown_steps: null"],
        ),
        ({"trainer.save_milestone_steps": (4, 0)}, ["trainer.save_milestone_steps: [4, 0] must be at least 1"]),
        ({"trainer.per_device_train_batch_size": 0}, ["trainer.per_device_train_batch_size: 0 must be at least 1"]),
        ({"dataset.alpha": 0.5}, ["dataset.alpha: 0.5 has no effect with task: pretraining; remove it, or write task"]),
        (
            {"optimizer.muon_config.muon_beta": 0.9},
            ["optimizer.muon_config.muon_beta: 0.9 has no effect with optimize"],
        ),
    ],
)
def test_checks_that_follow_from_the_schema(changes: dict[str, object], errors: list[str]) -> None:
    found = validate(build_config({**VALID, **changes}))
    assert [error[: len(start)] for error, start in zip(found, errors, strict=True)] == errors
