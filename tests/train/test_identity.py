"""What a resume may change, and that what it may change really changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from records import exact_steps, log_lines
from rewriting import edit_train_state, rewrite_manifest

from neobert.config.fields import FIELDS
from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import StartupError
from neobert.inference.model import load
from neobert.train import loop
from neobert.train.checkpoint.identity import FINAL_MASKS, as_int64, check_next_batch, compare
from neobert.train.loop import pretrain
from neobert.types import PackedBatch

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a run with dropout; tests continue it in folders of their own."""
    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(tiny(out, "trainer.max_steps=4", "model.dropout_prob=0.1", "scheduler.total_steps=12"))
    return out


def resumed(tiny: Tiny, trained: Path, out: Path, *overrides: str) -> Config:
    common = ["model.dropout_prob=0.1", "scheduler.total_steps=12", "trainer.max_steps=8"]
    return tiny(out, *common, f"trainer.resume_from_checkpoint={trained / 'checkpoints' / '4'}", *overrides)


def events_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


class Consumed:
    """The rows of training steps: their numbers, and their tokens with borders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[tuple[int, tuple[int, ...]]]] = []
        real = loop.train_step

        def train_step(model: Any, optimizer: Any, batches: list[PackedBatch], **more: Any) -> Any:
            rows = []
            for batch in batches:
                for number, key in enumerate(batch.row_keys.tolist()):
                    rows.append((key, tuple(batch.positions[number].tolist())))
            self.steps.append(rows)
            return real(model, optimizer, batches, **more)

        monkeypatch.setattr(loop, "train_step", train_step)

    def numbers(self) -> list[int]:
        return [key for rows in self.steps for key, _ in rows]


# ---- the rules ----


def mixture(**weights: float) -> list[dict[str, Any]]:
    """The facts of `dataset.mixture`: a source `a`, and those that are named."""
    return [{"path": "a", "weight": 1.0}, *({"path": name, "weight": weight} for name, weight in weights.items())]


FACTS: dict[str, Any] = {
    **dict.fromkeys(FIELDS, 1),
    "model.dropout_prob": 0.0,
    FINAL_MASKS: None,
    "tokenizer.path": None,
    "tokenizer.train": True,
    "tokenizer.name": None,
    "optimizer.lr": 1e-3,
    "trainer.max_steps": 100,
    "trainer.per_device_train_batch_size": 4,
    "dataset.mixture": mixture(b=1.0),
    "wandb.enabled": False,
    "tokenizer digest": "a",
    "data fingerprint": "f",
}


@pytest.mark.parametrize(
    ("changes", "allow", "kinds"),
    [
        ({"optimizer.lr": 2.0, "trainer.max_steps": 5}, (), {"schedule"}),
        ({"wandb.enabled": True, "trainer.save_steps": 5}, (), {"free"}),
        ({"trainer.per_device_train_batch_size": 2}, (), {"free"}),
        ({"trainer.per_device_train_batch_size": 2, "model.dropout_prob": 0.1}, (), {"needs declaring"}),
        ({"trainer.z_loss": 1e-4, "trainer.gradient_clipping": None}, (), {"needs declaring"}),
        ({"trainer.skip_spikes": 6, "trainer.max_bad_steps": 2, "trainer.rollback_steps": 9}, (), {"needs declaring"}),
        ({"dataset.on_bad_shard": "skip", "dataset.max_bad_records": 9}, (), {"needs declaring"}),
        ({"contrastive.learn_temperature": False}, (), {"fixed"}),
        ({FINAL_MASKS: 200}, (), {"free"}),
        ({FINAL_MASKS: 50, "datacollator.mlm_probability_final_step": 50}, (), {"free", "needs declaring"}),
        ({"data fingerprint": "g", "dataset.mixture": mixture(b=2.0)}, (), {"needs declaring"}),
        ({"data fingerprint": "g", "dataset.mixture": mixture(b=2.0)}, ("dataset.mixture",), {"declared"}),
        ({"data fingerprint": "g", "dataset.mixture": mixture(c=1.0)}, (), {"source"}),
        ({"dataset.mixture": mixture(b=2.0)}, (), {"free"}),
        ({"model.num_hidden_layers": 3}, ("model.num_hidden_layers",), {"fixed"}),
        ({"tokenizer digest": "b"}, (), {"fixed"}),
        ({"data fingerprint": "g"}, (), {"fixed"}),
        ({"optimizer.weight_decay": 0.0}, (), {"needs declaring"}),
        ({"optimizer.weight_decay": 0.0}, ("optimizer.weight_decay",), {"declared"}),
        ({"data fingerprint": "g", "dataset.path": "other"}, (), {"source"}),
        ({"data fingerprint": "g", "dataset.streaming": 0, "dataset.num_lanes": 64}, (), {"source"}),
        (
            {"data fingerprint": "g", "dataset.path": "x", "dataset.max_seq_length": 2},
            (),
            {"source", "needs declaring"},
        ),
        ({"dataset.path": "moved"}, (), {"free"}),
        ({"dataset.eval_samples": 5}, (), {"needs declaring"}),
        ({"trainer.eval_seed": 5}, (), {"needs declaring"}),
        ({"trainer.eval_seed": 5}, ("trainer.eval_seed",), {"declared"}),
        ({"datacollator.eval_mlm_probability": 5, "trainer.eval_max_batches": 2}, (), {"needs declaring"}),
        ({"trainer.per_device_eval_batch_size": 5}, (), {"needs declaring"}),
        ({"trainer.per_device_eval_batch_size": 5, "trainer.eval_max_batches": None}, (), {"needs declaring", "free"}),
        ({"data fingerprint": "g", "dataset.path": "x", "dataset.eval_split": "dev"}, (), {"source", "free"}),
        ({"data fingerprint": "g", "dataset.eval_samples": 5}, (), {"needs declaring"}),
        ({"data fingerprint": "g", "dataset.eval_samples": 5}, ("dataset.eval_samples",), {"declared"}),
        ({"model.rope": 0, "model.max_position_embeddings": 2}, ("model.max_position_embeddings",), {"fixed"}),
    ],
)
def test_classes_of_differences(changes: dict[str, Any], allow: tuple[str, ...], kinds: set[str]) -> None:
    comparison = compare(FACTS, {**FACTS, **changes}, allow, same_ranks=True)
    assert {d.key for d in comparison.differences} == set(changes)
    assert {d.kind for d in comparison.differences} == kinds


@pytest.mark.parametrize(
    ("changes", "same_ranks", "restarts", "same_next"),
    [
        ({}, True, False, True),
        ({}, False, False, True),
        ({"trainer.enforce_full_packed_batches": 0}, False, True, False),
        ({"seed": 2}, True, True, False),
        ({"dataset.num_lanes": 2}, True, True, False),
        ({"trainer.global_batch_size": 2}, True, False, False),
        ({"datacollator.mlm_probability": 2}, True, False, False),
        ({"datacollator.mlm_probability_final_step": 2, FINAL_MASKS: 2}, True, False, False),
        ({FINAL_MASKS: 2}, True, False, False),
        ({"datacollator.mlm_probability_final_step": 2}, True, False, True),
        ({"trainer.z_loss": 2}, True, False, True),
        ({"data fingerprint": "g", "dataset.mixture": mixture(b=2.0)}, True, True, False),
        ({"datacollator.mask_units": 2}, True, False, False),
        ({"trainer.batch_size_warmup_start": 2}, True, False, False),
        ({"optimizer.eps": 2}, True, False, True),
        ({"data fingerprint": "g", "dataset.path": "x"}, True, True, False),
    ],
)
def test_what_follows_for_the_order(changes: dict, same_ranks: bool, restarts: bool, same_next: bool) -> None:
    comparison = compare(FACTS, {**FACTS, **changes}, (), same_ranks=same_ranks)
    assert (comparison.restarts_order, comparison.same_next_batch) == (restarts, same_next)


def test_next_fit_batches_depend_on_the_ranks() -> None:
    facts = {**FACTS, "trainer.enforce_full_packed_batches": False}
    assert compare(facts, facts, (), same_ranks=True).same_next_batch
    assert not compare(facts, facts, (), same_ranks=False).same_next_batch


def test_resume_allow_is_checked_with_the_config(tiny: Tiny, tmp_path: Path) -> None:
    for keys, message in (
        ("[model.hidden_size]", "model.hidden_size can never change on resume"),
        ("[optimizer.lr]", "optimizer.lr may change without being declared"),
        ("[dataset.lanes]", "dataset.lanes is no key; the keys that can be declared are seed, "),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(tmp_path, f"trainer.resume_allow={keys}")


# ---- refused ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.max_seq_length=32", r"dataset.max_seq_length +needs declaring +64 -> 32"),
        ("dataset.num_lanes=1", r"dataset.num_lanes +needs declaring +2 -> 1"),
        ("dataset.window_documents=16", r"dataset.window_documents +needs declaring +32 -> 16"),
        ("datacollator.mlm_probability=0.3", r"datacollator.mlm_probability +needs declaring +0.2 -> 0.3"),
        ("datacollator.mask_all=true", r"datacollator.mask_all +needs declaring +false -> true"),
        ("datacollator.pack_sequences=false", r"datacollator.pack_sequences +needs declaring +true -> false"),
        ("seed=4", r"seed +needs declaring +3 -> 4"),
        ("optimizer.weight_decay=0", r"optimizer.weight_decay +needs declaring +0.1 -> 0.0"),
        ("optimizer.betas=[0.9,0.98]", r"optimizer.betas +needs declaring +\[0.9, 0.95\] -> \[0.9, 0.98\]"),
        ("model.dropout_prob=0", r"model.dropout_prob +needs declaring +0.1 -> 0.0"),
        ("model.rope_theta=50000", r"model.rope_theta +needs declaring +10000.0 -> 50000.0"),
        ("trainer.per_device_train_batch_size=8", r"trainer.global_batch_size +needs declaring +4 -> 8"),
        ("model.num_hidden_layers=3", r"model.num_hidden_layers +fixed +2 -> 3"),
        ("trainer.z_loss=1e-4", r"trainer.z_loss +needs declaring +0.0 -> 0.0001"),
        ("trainer.gradient_clipping=null", r"trainer.gradient_clipping +needs declaring +1.0 -> null"),
        ("trainer.skip_spikes=6", r"trainer.skip_spikes +needs declaring +null -> 6.0"),
        ("dataset.on_bad_shard=skip", r'dataset.on_bad_shard +needs declaring +"error" -> "skip"'),
        ("model.hidden_act=gelu", r'model.hidden_act +fixed +"swiglu" -> "gelu"'),
    ],
)
def test_an_undeclared_change_is_refused_before_anything_is_loaded(
    tiny: Tiny, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr("neobert.train.checkpoint.resume.load_file", lambda path: pytest.fail("the weights were read"))
    with pytest.raises(StartupError, match=message) as caught:
        pretrain(resumed(tiny, trained, tmp_path / "run", override))
    key = override.partition("=")[0]
    keys = f"{key},trainer.global_batch_size" if "per_device" in override else key
    if "fixed" not in message:
        assert f"accept the change with trainer.resume_allow=[{keys}]" in str(caught.value)


def test_another_tokenizer_is_refused_with_both_digests(
    tiny: Tiny, trained: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"].append({**definition["added_tokens"][-1], "id": 360, "content": "[NEW]"})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = resumed(tiny, trained, tmp_path / "run", f"tokenizer.path={folder}")
    old, new = (
        load_tokenizer(tiny(tmp_path, f"tokenizer.path={f}").tokenizer).digest for f in (tokenizer_folder, folder)
    )
    assert old != new
    with pytest.raises(StartupError, match=rf'tokenizer digest +fixed +"{old}" -> "{new}"'):
        pretrain(config)
    gone = resumed(tiny, trained, tmp_path / "run", f"tokenizer.path={tmp_path / 'gone'}")
    assert pretrain(gone).state.step == 8, "the checkpoint has the tokenizer: the named folder need not exist any more"


@pytest.mark.parametrize("change", ["longer", "shorter", "a file more", "a file less", "one letter"])
def test_other_data_under_the_same_setting_is_refused(tiny: Tiny, tmp_path: Path, corpus: Path, change: str) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    pretrain(tiny(out, f"dataset.path={data}", "trainer.max_steps=2"))
    first = data / "part-0.jsonl"
    text = first.read_text()
    if change == "longer":
        first.write_text(text + json.dumps({"text": "one more document for this file"}) + "\n")
    elif change == "shorter":
        first.write_text(text[: text.rindex("\n", 0, -1) + 1])
    elif change == "a file more":
        (data / "part-2.jsonl").write_text(json.dumps({"text": "one more file for this folder"}) + "\n")
    elif change == "a file less":
        (data / "part-1.jsonl.gz").unlink()
    else:
        at = text.index("the cat")
        first.write_text(text[:at] + "the cut" + text[at + 7 :])
    resume = ["trainer.max_steps=4", "trainer.resume_from_checkpoint=latest", f"dataset.path={data}"]
    with pytest.raises(StartupError, match="the data under this run changed"):
        pretrain(tiny(out, *resume))


def test_the_next_batch_must_be_the_promised_one(tiny: Tiny, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(tiny(whole))
    fifth = log_lines(whole, "step")[4]["batch_digest"]
    checkpoint = whole / "checkpoints" / "4"

    def promise(digest: str | None) -> None:
        edit_train_state(checkpoint, lambda state: state["data"].update(next_batch_digest=digest))

    promise(fifth)
    resume = f"trainer.resume_from_checkpoint={checkpoint}"
    pretrain(tiny(out, resume))
    assert exact_steps(out) == exact_steps(whole, after=4)
    promise("0123456789abcdef")
    with pytest.raises(StartupError, match=rf"digest {fifth}, the checkpoint says 0123456789abcdef; restore the files"):
        pretrain(tiny(tmp_path / "other", resume))
    for number, skipped in enumerate(
        (
            ["datacollator.mlm_probability=0.3", "trainer.resume_allow=[datacollator.mlm_probability]"],
            ["seed=8", "trainer.resume_allow=[seed]"],
            ["trainer.global_batch_size=8", "trainer.resume_allow=[trainer.global_batch_size]"],
        )
    ):
        assert pretrain(tiny(tmp_path / f"skipped-{number}", resume, "trainer.max_steps=5", *skipped)).state.step == 5
    promise(None)
    assert pretrain(tiny(tmp_path / "unknown", resume, "trainer.max_steps=5")).state.step == 5


def test_digests_of_ranks_are_summed_around() -> None:
    halves = [2**64 - 5, 2**63 + 9]
    assert [as_int64(x) for x in halves] == [-5, -(2**63) + 9]
    check_next_batch(f"{sum(halves) % 2**64:016x}", sum(as_int64(x) for x in halves))
    with pytest.raises(StartupError, match="the data under this run changed"):
        check_next_batch(f"{(sum(halves) + 1) % 2**64:016x}", sum(as_int64(x) for x in halves))


# ---- accepted ----


def test_free_keys_are_not_declared(
    tiny: Tiny, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    free = ["optimizer.lr=1e-3", "scheduler.name=linear", "dataset.num_workers=0", "trainer.logging_steps=1"]
    pretrain(resumed(tiny, trained, out, *free))
    printed = capsys.readouterr().out
    assert "differs from" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["optimizer.lr", "schedule", "0.01", "->", "0.001"] in lines
    assert ["dataset.num_workers", "free", "null", "->", "0"] in lines
    assert log_lines(out, "step")[0]["lr"] < 1e-3


def test_another_batch_keeps_the_row_counter(
    tiny: Tiny, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumed = Consumed(monkeypatch)
    whole = tmp_path / "whole"
    pretrain(tiny(whole, "trainer.max_steps=10", "trainer.save_model=false"))
    same_rows = dict(row for rows in consumed.steps for row in rows)
    consumed.steps.clear()
    out = tmp_path / "run"
    change = ["trainer.per_device_train_batch_size=3", "trainer.gradient_accumulation_steps=2"]
    declared = ["trainer.per_device_train_batch_size", "trainer.global_batch_size"]  # The first for its dropout masks.
    pretrain(resumed(tiny, trained, out, *change, f"trainer.resume_allow=[{','.join(declared)}]"))
    assert consumed.numbers() == list(range(16, 16 + 4 * 6)), "4 steps of 4 rows, then 6 a step: none lost, none twice"
    assert all(same_rows[key] == layout for rows in consumed.steps for key, layout in rows), "the same rows"
    (event,) = (e for e in events_of(out) if e["event"] == "resumed")
    assert event["declared"] == declared


@pytest.mark.parametrize(
    "change", ["dataset.max_seq_length=32", "dataset.num_lanes=1", "seed=4", "datacollator.pack_sequences=false"]
)
def test_another_order_starts_at_its_first_row(
    tiny: Tiny,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    consumed = Consumed(monkeypatch)
    fresh, out = tmp_path / "fresh", tmp_path / "run"
    pretrain(tiny(fresh, change, "trainer.max_steps=4"))
    first = list(consumed.steps)
    consumed.steps.clear()
    key = change.partition("=")[0]
    pretrain(resumed(tiny, trained, out, change, f"trainer.resume_allow=[{key}]"))
    assert consumed.steps == first
    assert [x["step"] for x in log_lines(out, "step")] == [5, 6, 7, 8], "the step continues"
    restarted = [e for e in events_of(out) if e["event"] == "order_restarted"]
    assert [(e["step"], e["keys"]) for e in restarted] == [(4, [key])]
    assert capsys.readouterr().out.count(f"warning: {key} changed: model, optimizer, schedule and step continue") == 1


def test_held_out_documents_may_change_when_declared(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    more = "dataset.eval_samples=20"
    with pytest.raises(StartupError, match=r"trainer.resume_allow=\[dataset.eval_samples\]"):
        pretrain(resumed(tiny, trained, tmp_path / "refused", more))
    out = tmp_path / "run"
    pretrain(resumed(tiny, trained, out, more, "trainer.resume_allow=[dataset.eval_samples]"))
    kinds = [e["event"] for e in events_of(out)]
    assert kinds[:3] == ["order_restarted", "resumed", "inventory"]
    assert {"split": "train", "column": "text"}.items() <= events_of(out)[2]["files"][0].items()
    assert log_lines(out, "eval")[0]["num_documents"] == 20


def test_optimizer_settings_of_the_config_hold(
    tiny: Tiny, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keys = "optimizer.weight_decay,optimizer.betas,optimizer.eps"
    change = ["optimizer.weight_decay=0.5", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-6"]
    pretrain(resumed(tiny, trained, out, *change, f"trainer.resume_allow=[{keys},seed]"))
    groups = torch.load(out / "checkpoints/8/optimizer.bin", weights_only=True)["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert {(tuple(g["betas"]), g["eps"]) for g in groups} == {((0.8, 0.9), 1e-6)}
    assert "trainer.resume_allow: seed is what it was; it need not be declared" in capsys.readouterr().out


def test_masking_may_change_when_declared_and_rows_stay(
    tiny: Tiny, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumed = Consumed(monkeypatch)
    out = tmp_path / "run"
    allow = "trainer.resume_allow=[datacollator.mlm_probability,datacollator.mask_all]"
    pretrain(resumed(tiny, trained, out, "datacollator.mlm_probability=0.4", "datacollator.mask_all=true", allow))
    assert consumed.numbers() == list(range(16, 32))
    steps = log_lines(out, "step")
    fraction = sum(x["num_targets"] for x in steps) / sum(x["num_tokens"] for x in steps)
    assert 0.3 < fraction < 0.42


def test_a_run_continues_at_a_longer_context(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    longer = [
        "dataset.max_seq_length=128",
        "model.max_position_embeddings=256",
        "model.rope_theta=50000",
        "trainer.per_device_train_batch_size=2",
        "trainer.resume_allow=[dataset.max_seq_length,model.max_position_embeddings,model.rope_theta,"
        "trainer.global_batch_size,trainer.per_device_train_batch_size]",
    ]
    result = pretrain(resumed(tiny, trained, out, *longer))
    assert (result.state.step, result.reason) == (8, "finished")
    state = json.loads((out / "checkpoints/8/train_state.json").read_text())
    assert state["data"]["max_seq_length"] == 128
    assert state["data"]["next_row"] == 4 * 2, "the order started again"
    (origin,) = state["lineage"]
    assert (origin["step"], origin["checkpoint"]) == (4, str(trained / "checkpoints" / "4"))
    assert origin["resume_allow"][0] == "dataset.max_seq_length"
    config = load(out, device="cpu").module.encoder.config
    assert (config.max_position_embeddings, config.rope_theta) == (256, 50000.0)
    # A second resume, of the longer run itself, needs no declaration and keeps the whole line of descent.
    again = [word for word in longer if "resume_allow" not in word]
    pretrain(
        tiny(out, "model.dropout_prob=0.1", *again, "trainer.resume_from_checkpoint=latest", "trainer.max_steps=9")
    )
    lineage = json.loads((out / "checkpoints/9/train_state.json").read_text())["lineage"]
    assert [entry["step"] for entry in lineage] == [4, 8]


def test_a_resume_from_elsewhere_does_not_mix_with_a_run(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=2"))
    with pytest.raises(StartupError, match=r"already holds a run; continue that run with .*latest, or set .*overwrite"):
        pretrain(resumed(tiny, trained, out))
    pretrain(resumed(tiny, trained, out, "trainer.overwrite_output_dir=true"))
    assert [x["step"] for x in log_lines(out, "step")] == [5, 6, 7, 8]
    assert (tmp_path / "run.old-1" / "checkpoints" / "2").is_dir()


def test_counters_under_the_usual_names(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    accumulate = ["trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=4"]
    state = pretrain(
        tiny(out, "dataset.streaming=false", "trainer.max_steps=30", *accumulate, "trainer.save_steps=15")
    ).state
    counters = torch.load(out / "checkpoints/30/custom_checkpoint_0.pkl", weights_only=True)
    assert counters["tokens"] == state.tokens
    assert counters["batches"] == 60, "micro-batches, not steps"
    assert counters["epochs"] >= 1
    assert 0 <= counters["batches_in_epoch"] < 60
    early = torch.load(out / "checkpoints/15/custom_checkpoint_0.pkl", weights_only=True)
    assert early["batches"] == 30


def test_every_position_in_windows_and_epochs_can_be_resumed(tiny: Tiny, tmp_path: Path) -> None:
    """Steps that end a window, an epoch of a lane, and the run are among these cuts."""
    small = ["dataset.window_documents=4", "dataset.num_lanes=2", "trainer.eval_steps=0", "trainer.logging_steps=0"]
    data = tmp_path / "few.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"document number {i} of a few, with words"}) + "\n" for i in range(40))
    )
    settings = [*small, f"dataset.path={data}", "trainer.max_steps=9", "model.dropout_prob=0.1"]
    whole = tmp_path / "whole"
    pretrain(tiny(whole, *settings, "trainer.save_steps=1"))
    states = [json.loads((whole / f"checkpoints/{s}/train_state.json").read_text())["data"] for s in range(1, 10)]
    positions = [(lane["epoch"], lane["window"]) for state in states for lane in state["lanes"].values()]
    assert set(positions) == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)}, "windows and an epoch end among the cuts"
    for step in range(1, 9):
        out = tmp_path / f"from-{step}"
        pretrain(
            tiny(out, *settings, "trainer.save_steps=0", f"trainer.resume_from_checkpoint={whole}/checkpoints/{step}")
        )
        assert exact_steps(out) == exact_steps(whole, after=step)
        shutil.rmtree(out)


def test_a_run_falls_back_past_damaged_checkpoints_and_repeats_what_was_lost(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(tiny(whole, "trainer.max_steps=16"))
    pretrain(tiny(out, "scheduler.total_steps=16"))
    for name, damage in (("12", 0), ("8", 100)):  # A power loss, and a flipped byte.
        path = out / "checkpoints" / name / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[50_000] ^= 4
        path.write_bytes(bytes(content) if damage else b"")
    capsys.readouterr()
    pretrain(tiny(out, "trainer.max_steps=16", "trainer.resume_from_checkpoint=latest"))
    printed = capsys.readouterr().out
    skipped = f"warning: checkpoint {out}/checkpoints"
    assert f"{skipped}/12 skipped: model.safetensors is 0 bytes, manifest.json says" in printed
    assert f"{skipped}/8 skipped: model.safetensors does not match its sha256" in printed
    assert f"resuming from {out}/checkpoints/4/" in printed
    assert exact_steps(out) == exact_steps(whole)
    assert {p.name for p in (out / "checkpoints").iterdir()} >= {
        "4",
        "8",
        "12",
        "16",
        ".superseded-8",
        ".superseded-12",
    }


def test_a_log_line_torn_by_a_kill_does_no_harm(tiny: Tiny, whole_run: Callable[..., Path], tmp_path: Path) -> None:
    whole, out = whole_run(), tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=8", "scheduler.total_steps=12"))
    with (out / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 9, "loss": 1.0}\n{"kind": "step", "st')
    pretrain(tiny(out, "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(out) == exact_steps(whole)
    rewrite_manifest(out / "checkpoints" / "12")


def test_sizes_of_the_world_that_do_not_divide_the_batch(tiny: Tiny, tmp_path: Path) -> None:
    from neobert.train.build import choose_rows_per_step

    config = tiny(tmp_path, "trainer.global_batch_size=12")
    for world in (1, 3):
        assert choose_rows_per_step(config, world) == 12
    with pytest.raises(StartupError, match=r"12 is no multiple of .* = 4 x 5; the next one that is: 20"):
        choose_rows_per_step(config, 5)
