"""Records of the speedrun: one is set, resumed and replayed on a track of a few steps; rules, statistics, the table."""

import dataclasses
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neobert.benchmark import speedrun, speedrun_records, trial
from neobert.benchmark.speedrun import count_slot_steps, digest_tokenizer
from neobert.benchmark.speedrun_data import DATA, FixedFiles, HubExtract, StdlibExtract, build_data, build_manifest
from neobert.benchmark.speedrun_records import (
    SpeedRecord,
    compare_losses,
    load_record,
    load_records,
    predict_interval,
    rank_records,
    write_record,
)
from neobert.benchmark.speedrun_replay import judge
from neobert.benchmark.speedrun_table import describe_records, draw_records, replace_table, write_table
from neobert.benchmark.speedrun_tracks import TRACKS, SpeedrunError, Track, build_config, check_config
from neobert.commands.speedrun_commands import speedrun as command
from neobert.config.load import ConfigError, load_config
from neobert.config.schema_data import TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.disk import write_json
from neobert.errors import CallError
from neobert.inference.mlm_loss import LossSettings

ROOT = Path(__file__).parents[2]
CONFIG = """# A tiny model.
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48,
  max_position_embeddings: 64}
dataset: {max_seq_length: 64, num_lanes: 2, window_documents: 32}
optimizer: {lr: 1.0e-2}
scheduler: {warmup_steps: 2}
trainer: {per_device_train_batch_size: 2, mixed_precision: "no", torch_compile: false}
"""
TINY = Track(
    name="tiny",
    title="six steps",
    data=("tiny",),
    tokenizer=("tokenizer.train=true", "tokenizer.vocab_size=300"),
    tokenizer_sha256=None,
    hardware="any CPU",
    threads=1,
    slots=6 * 2 * 64 + 5,
    goal=4.0,
    logging_steps=2,
)


@pytest.fixture(scope="module", autouse=True)
def small_tracks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "HELD_OUT", LossSettings(mask_all=True, max_length=64, truncate=True, max_documents=20))
        patch.setattr(trial, "use_threads", lambda count: None)
        patch.setattr(speedrun, "measure_rates", lambda device: {"fp32": 1e9, "bf16": 2e9})
        patch.setitem(TRACKS, "tiny", TINY)
        patch.setitem(TRACKS, "timed", dataclasses.replace(TINY, name="timed", slots=None, seconds=1e-4))
        patch.setitem(DATA, "tiny", FixedFiles(source="made by a test"))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A folder `speedrun` with a manifest, its data, a config, and a record of two seeds."""
    here = tmp_path_factory.mktemp("speedrun")
    (here / "data").mkdir()
    for name, part in (("train", texts[:200]), ("validation", texts[200:])):
        (here / "data" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    write_json(make_folder(here / "home" / "data") / "tiny.json", build_manifest("tiny", here / "data"))
    (here / "config.yaml").write_text(CONFIG)
    assert run(here, "first", "--seeds", "0,1") == 0
    return here


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def run(here: Path, name: str, *words: str, track: str = "tiny") -> int:
    where = ["--data", here / "data", "--output", here / "home/records" / name, "--home", here / "home"]
    return command("neobert speedrun", [*map(str, ["run", track, here / "config.yaml", *where]), *place(here), *words])


def place(here: Path) -> list[str]:
    return ["--work", str(here / "work")]


def verify(here: Path, *words: str) -> int:
    call = ["verify", here / "home/records/first", "--data", here / "data", "--home", here / "home"]
    return command("neobert speedrun", [*map(str, call), *words])


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


# ---- setting and replaying ----


def test_a_record_says_all_that_a_replay_needs(base: Path) -> None:
    folder = base / "home/records/first"
    record = load_record(folder)
    assert [(x.seed, x.num_steps, x.num_documents) for x in record.runs] == [(0, 6, 20), (1, 6, 20)]
    assert record.runs[0].losses_sha256 != record.runs[1].losses_sha256
    assert record.runs[0].gemm_flops == {"fp32": 1e9, "bf16": 2e9}
    assert (record.data, record.idea, record.title, record.missing_seeds) == ("tiny", "A tiny model.", "first", [])
    assert {"cpu", "cores", "threads", "torch"} <= record.environment.keys()
    assert {"commit", "clean", "sha256"} == record.code.keys()
    saved = json.loads((folder / "record.json").read_text())
    losses = [x.loss for x in record.runs]
    assert saved["mean"] == pytest.approx(sum(losses) / 2)
    assert saved["std"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
    logged = [json.loads(line) for line in (folder / "seed-1.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert str(base) not in "".join(path.read_text() for path in folder.iterdir()), "no path of this machine"
    assert not list((base / "work").glob("seed-*")), "runs that were scored are removed"


def test_a_replay_is_the_same_and_finished_seeds_are_skipped(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    assert verify(folder, "--seed", "1") == 0
    said = capsys.readouterr().out
    assert "the training loss of all 6 steps is equal, bit for bit" in said
    assert said.endswith("\nsame\n")
    with pytest.raises(SpeedrunError, match=r"--seed: \[7\]; .* has the seeds \[0, 1\]"):
        verify(folder, "--seed", "7")

    def train_nothing(config: object) -> None:
        raise AssertionError("a finished seed is not made again")

    monkeypatch.setattr(trial, "train", train_nothing)
    assert run(folder, "first", "--seeds", "0,1") == 0
    assert "seed 1: finished before" in capsys.readouterr().err
    assert load_record(folder / "home/records/first").title == "first"
    assert run(folder, "first", "--seeds", "0,1", "--title", "Smaller still", "--idea", "In other words.") == 0
    assert run(folder, "first", "--seeds", "0,1") == 0
    record = load_record(folder / "home/records/first")
    assert (record.title, record.idea) == ("Smaller still", "In other words.")
    with pytest.raises(SpeedrunError, match=r"first: was started with config_sha256 .* choose another --output"):
        run(folder, "first", "--optimizer.lr", "2e-2")
    with pytest.raises(SpeedrunError, match=r"--steps: 5, .* make 6"):
        run(folder, "first", "--steps", "5")


def test_a_record_that_was_tampered_with_is_refused_or_not_confirmed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    record = folder / "home/records/first"
    config, file = record / "config.yaml", record / "record.json"
    kept, saved = config.read_text(), file.read_text()
    other = kept.replace("  lr: 0.01\n", "  lr: 0.1\n")
    assert other != kept
    config.write_text(other)
    with pytest.raises(SpeedrunError, match=r"config.yaml is not the config that was recorded"):
        verify(folder)
    # Its digest is written to fit: the replay has other losses, far from those of the seeds.
    rewrite(file, lambda values: values.update(config_sha256=speedrun_records.digest_text(other), std=1e-9))
    with pytest.raises(SpeedrunError, match="mean and std are"):
        verify(folder)

    def claim(values: dict[str, Any]) -> None:
        values["runs"][0]["loss"], values["runs"][1]["loss"] = 1.0, 1.001
        values["config_sha256"] = speedrun_records.digest_text(other)
        values |= {"mean": statistics.mean([1.0, 1.001]), "std": statistics.stdev([1.0, 1.001])}

    file.write_text(saved)
    rewrite(file, claim)
    assert verify(folder) == 1
    said = capsys.readouterr().out
    assert "99% of further seeds are expected in " in said
    assert "rows and masks are equal" in said
    assert said.endswith("\nnot\n")


@pytest.mark.parametrize(
    ("key", "value"),
    [("seeds", ["0", "1"]), ("num_steps", "6"), ("code", None), ("runs.loss", "5.0"), ("runs.seed", [])],
)
def test_a_value_of_another_type_is_named(folder: Path, key: str, value: object) -> None:
    def change(values: dict[str, Any]) -> None:
        (values["runs"][0] if key.startswith("runs.") else values)[key.removeprefix("runs.")] = value

    rewrite(folder / "home/records/first/record.json", change)
    with pytest.raises(SpeedrunError, match=rf"record.json: .*{key.removeprefix('runs.')} is .*; restore the file"):
        load_record(folder / "home/records/first")


def test_what_a_replay_says(base: Path) -> None:
    pytest.importorskip("scipy")
    record = load_record(base / "home/records/first")
    run, other = record.runs
    low, high = predict_interval([run.loss, other.loss]) or (0.0, 0.0)
    assert judge(record, run).verdict == "same"
    wrong = judge(record, dataclasses.replace(run, loss=run.loss - 0.01))
    assert wrong.verdict == "not"
    assert "the recorded held-out loss is wrong" in wrong.lines[0]
    near = judge(record, dataclasses.replace(run, loss=(low + high) / 2, losses_sha256="x", batches_sha256="x"))
    assert near.verdict == "within noise"
    assert "rows or masks differ" in near.lines
    assert judge(record, dataclasses.replace(run, loss=high + 0.01, losses_sha256="x")).verdict == "not"
    elsewhere = dataclasses.replace(record, environment={**record.environment, "cpu": "another"})
    said = judge(elsewhere, dataclasses.replace(run, losses_sha256="x")).lines
    assert any("bits cannot be compared" in line and "cpu another there" in line for line in said)
    alone = dataclasses.replace(record, runs=(run,))
    assert judge(alone, dataclasses.replace(run, losses_sha256="x")).verdict == "not"


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    def kill(name: str, now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    patch.setattr("neobert.train.loop.fault_point", kill)


def test_a_seed_that_was_killed_resumes_without_a_clock(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "second", "--seeds", "0")
    assert load_record(folder / "home/records/second").missing_seeds == [0]
    assert run(folder, "second", "--seeds", "0") == 0
    said = capsys.readouterr().err
    assert "seed 0: starts from scratch" in said
    assert re.search(r"seed 0: resumes from step [45]\n", said)
    (again,), first = (
        load_record(folder / "home/records/second").runs,
        load_record(folder / "home/records/first").runs[0],
    )
    assert (again.losses_sha256, again.batches_sha256, again.loss) == (
        first.losses_sha256,
        first.batches_sha256,
        first.loss,
    )


def test_under_a_clock_a_killed_seed_starts_from_scratch_and_late_is_no_record(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "timed", "--seeds", "0", "--steps", "4", track="timed")
    capsys.readouterr()
    assert run(folder, "timed", "--seeds", "0", "--steps", "4", track="timed") == 1
    captured = capsys.readouterr()
    assert "seed 0: was interrupted; starts from scratch" in captured.err
    record = load_record(folder / "home/records/timed")
    assert f"took {record.excess:.1f} s more than" in captured.out
    assert record.excess == record.runs[0].seconds - 1e-4
    lines = (folder / "home/records/timed/seed-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4], "every step counts once"


def test_the_number_of_steps_under_a_clock_leaves_a_margin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int]] = []

    def measure_steps(file: Path, overrides: list[str], *, seconds: float, steps: int) -> int:
        assert file.read_text().startswith("task: pretraining"), "the config that is recorded"
        asked.append((seconds, steps))
        return 2

    monkeypatch.setattr(trial, "measure_steps", measure_steps)
    run(folder, "timed", "--seeds", "0", "--speed-steps", "3", track="timed")
    assert asked == [(pytest.approx(0.98e-4), 3)]
    assert load_record(folder / "home/records/timed").runs[0].num_steps == 2


def test_an_interruption_before_the_first_seed_leaves_no_half_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trial, "measure_steps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "timed", "--seeds", "0", track="timed")
    assert not list((folder / "home/records/timed").iterdir())
    monkeypatch.setattr(trial, "measure_steps", lambda *_, **__: 2)
    run(folder, "timed", "--seeds", "0", track="timed")
    assert load_record(folder / "home/records/timed").runs


# ---- the rules ----


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "dataset.path=other",
            "dataset.path: 'other', but the data of the track tiny may not change; the data come with",
        ),
        ("dataset.name=python_stdlib", "dataset.name: 'python_stdlib', but the data"),
        ("dataset.train_split=validation", "dataset.train_split: 'validation'"),
        (
            "tokenizer.vocab_size=500",
            "tokenizer.vocab_size: 500, but the tokenizer of the track tiny may not change; use 300",
        ),
        ("seed=4", "seed: 4, but the seeds of the track tiny may not change; remove the key and write --seeds"),
        ("model.init_from=run", "model.init_from: 'run', but the start from random weights"),
        ("trainer.device=cuda", "trainer.device: 'cuda', but the hardware of the track tiny may not change; use cpu"),
    ],
)
def test_a_key_that_the_track_fixes_is_refused(folder: Path, setting: str, said: str) -> None:
    with pytest.raises(SpeedrunError) as error:
        check_config(TINY, folder / "config.yaml", [setting])
    assert said in str(error.value)
    key, _, value = setting.partition("=")
    section, _, name = key.rpartition(".")
    (folder / "other.yaml").write_text(f"{section}: {{{name}: {value}}}\n" if section else f"{key}: {value}\n")
    with pytest.raises(SpeedrunError) as error:
        check_config(TINY, folder / "other.yaml", [])
    assert said in str(error.value)


def test_a_variable_does_not_hide_a_key(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text("variables: {all: {train_split: validation}}\ndataset: $variables.all\n")
    with pytest.raises(SpeedrunError, match=r"dataset.train_split: 'validation', but the data of the track tiny"):
        check_config(TINY, config, [])
    config.write_text("variables: {size: 300}\ntokenizer: {vocab_size: $variables.size}\n")
    check_config(TINY, config, [])
    config.write_text("dataset: $variables.none\n")
    with pytest.raises(SpeedrunError, match=r"config.yaml: there is no variable 'none'"):
        check_config(TINY, config, [])
    config.write_text("seed: many\n")
    with pytest.raises(SpeedrunError, match=r"config.yaml: seed: 'many' is not an integer"):
        check_config(TINY, config, [])


def test_a_run_that_could_not_be_scored_is_refused_or_saved(folder: Path) -> None:
    for objective in ("clm", "replaced_token"):
        with pytest.raises(SpeedrunError, match=f"trainer.objective: {objective}, .*; use mlm or mlm_jepa or distill"):
            run(folder, "second", "--trainer.objective", objective)
    with pytest.raises(SpeedrunError, match=r"model.max_position_embeddings: 63, .* reads 64 tokens of a document"):
        run(folder, "second", "--model.max_position_embeddings", "63", "--dataset.max_seq_length", "32")
    settings = ["trainer.save_model=false", "trainer.overwrite_output_dir=true"]
    trainer = build_config(TINY, folder / "config.yaml", settings, folder / "data").trainer
    assert (trainer.save_model, trainer.overwrite_output_dir) == (True, False)


def test_what_the_track_says_itself_may_be_written(folder: Path) -> None:
    check_config(
        TINY, folder / "config.yaml", ["tokenizer.vocab_size=300", "seed=0", "optimizer.lr=1", "dataset.path=null"]
    )


def test_another_file_is_named(folder: Path) -> None:
    (folder / "data" / "train.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(
        SpeedrunError, match=r"differs from\n  - tiny \(made by a test\): train.jsonl has 14 bytes, not "
    ):
        run(folder, "second")
    (folder / "data" / "train.jsonl").unlink()
    with pytest.raises(SpeedrunError, match=r"train.jsonl is missing"):
        verify(folder)
    with pytest.raises(SpeedrunError, match=r"--data: .*none is no folder; neobert speedrun data tiny"):
        command("", ["verify", str(folder / "home/records/first"), "--data", "none", "--home", str(folder / "home")])
    assert not (folder / "home/records/second").exists()


def test_a_damaged_manifest_is_named(folder: Path) -> None:
    (folder / "home/data/tiny.json").write_text("<<<<<<<")
    with pytest.raises(SpeedrunError, match=r"tiny.json: is no manifest \(.*\); restore the file"):
        run(folder, "second")


def test_a_record_of_a_gpu_is_replayed_on_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKS, "tiny", dataclasses.replace(TINY, gpus=("T1000",), hardware="one T1000"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SpeedrunError, match="tiny: was set on one T1000, and this machine has no GPU"):
        verify(folder)


def test_other_bytes_and_more_files_are_named(folder: Path) -> None:
    file = folder / "data" / "train.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace("a", "b", 1))
    with pytest.raises(SpeedrunError, match=r"train.jsonl has another sha256"):
        run(folder, "second")
    file.write_text(kept)
    (folder / "data" / "train-2.jsonl").write_text(kept)
    with pytest.raises(SpeedrunError, match=r"train-2.jsonl is not part of it; remove it"):
        run(folder, "second")
    (folder / "data" / "train-2.jsonl").rename(make_folder(folder / "data" / "more") / "train-2.jsonl")
    with pytest.raises(SpeedrunError, match=r"more is not part of it; remove it"):
        run(folder, "second")


def test_another_machine_or_tokenizer_is_refused(
    folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpeedrunError, match="--threads: 3, and tiny computes with 1"):
        run(folder, "second", "--threads", "3")
    with pytest.raises(SpeedrunError, match="the runs of tiny train their own; leave it out"):
        run(folder, "second", "--tokenizer", str(tokenizer_folder))
    fixed = dataclasses.replace(TINY, tokenizer=("tokenizer.name=x",), tokenizer_sha256="0" * 64)
    monkeypatch.setitem(TRACKS, "tiny", fixed)
    with pytest.raises(SpeedrunError, match=r"makes other tokens than that of tiny .* use tokenizer.name=x"):
        run(folder, "second", "--tokenizer", str(tokenizer_folder))
    digest = digest_tokenizer(load_tokenizer(TokenizerSection(path=str(tokenizer_folder))))
    monkeypatch.setitem(TRACKS, "tiny", dataclasses.replace(fixed, tokenizer_sha256=digest))
    assert run(folder, "same", "--tokenizer", str(tokenizer_folder), "--seeds", "0", "--steps", "2") == 0
    record = folder / "home/records/same"
    assert load_record(record).runs[0].tokenizer_sha256 == digest
    assert str(tokenizer_folder) not in (record / "config.yaml").read_text()
    monkeypatch.setitem(TRACKS, "tiny", dataclasses.replace(TINY, gpus=("T1000",), hardware="one T1000"))
    with pytest.raises(SpeedrunError, match="tiny: needs one T1000, and this machine has "):
        run(folder, "second")
    assert not (folder / "home/records/second").exists()


def test_steps_of_a_number_of_slots(folder: Path) -> None:
    def count(slots: int, *settings: str) -> int:
        settings = (
            "dataset.path=x",
            "tokenizer.train=true",
            "tokenizer.vocab_size=300",
            "trainer.max_steps=1",
            *settings,
        )
        return count_slot_steps(slots, load_config(folder / "config.yaml", settings))

    assert [count(128 * n + extra) for n, extra in ((1, 0), (3, 0), (3, 127))] == [1, 3, 3]
    grows = ("trainer.global_batch_size=8", "trainer.batch_size_warmup_start=2", "trainer.batch_size_warmup_steps=3")
    assert [count(64 * rows, *grows) for rows in (2, 5, 6, 12, 19, 20)] == [1, 1, 2, 3, 3, 4]  # 2, 4, 6, 8 rows.
    with pytest.raises(SpeedrunError, match="a step of 2 rows of 64 has more than 100 row slots; use fewer rows"):
        count(100)
    with pytest.raises(SpeedrunError, match="enforce_full_packed_batches: false"):
        count(1000, "trainer.enforce_full_packed_batches=false")
    with pytest.raises(SpeedrunError, match="--steps: 7, and 773 row slots are 6 steps"):
        run(folder, "second", "--steps", "7")


def test_wrong_calls(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(CallError, match="WORLD_SIZE: 2 processes; seeds run one after the other in one process"):
            run(folder, "second")
    with pytest.raises(CallError, match=r"none/data is not there; .* call this in a clone"):
        command("", ["table", "--home", str(tmp_path / "none")])
    with pytest.raises(CallError, match="track: 'cpu-418s' is unknown; write one of cpu-417s, stdlib-417s, cpu-tokens"):
        run(folder, "second", track="cpu-418s")
    for seeds in ("0,x", "0,00", ""):
        with pytest.raises(CallError, match=f"'{seeds}': write different numbers"):
            run(folder, "second", "--seeds", seeds)
    with pytest.raises(ConfigError, match=r"seed: .*99999999999999999999"):
        run(folder, "second", "--seeds", "0,99999999999999999999")
    (folder / "config.yaml").write_text(CONFIG.partition("\n")[2])
    with pytest.raises(CallError, match="--idea: say in one sentence what is new"):
        run(folder, "second")
    with pytest.raises(SpeedrunError, match="name the folder of a record"):
        load_record(folder)


# ---- statistics ----


def test_t_tests_of_known_numbers() -> None:
    pytest.importorskip("scipy")
    # With two degrees of freedom P(T < t) = 1/2 + t / (2 sqrt(2 + t^2)). Differences -0.1, -0.2, -0.3: t = -2 sqrt(3).
    paired = compare_losses({0: 5.0, 1: 5.1, 2: 5.2}, {2: 4.9, 0: 4.9, 1: 4.9})
    assert paired.paired
    assert paired.difference == pytest.approx(-0.2)
    assert paired.p == pytest.approx(0.5 - math.sqrt(12) / (2 * math.sqrt(14)), abs=1e-9)
    assert not paired.is_better
    welch = compare_losses({0: 1.0, 1: 1.2}, {2: 0.5, 3: 0.7})
    t = -0.5 / math.sqrt(0.02)
    assert not welch.paired
    assert welch.p == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-9)
    assert compare_losses({0: 1.0, 1: 1.2}, {0: 0.5}).p is None
    assert compare_losses({0: 1.0, 1: 1.5}, {0: 0.5, 1: 1.0}).p is None, "equal differences have no t"
    rounded = compare_losses({0: 5.1, 1: 5.2, 2: 5.3}, {0: 5.0, 1: 5.1, 2: 5.2})
    assert len({5.1 - 5.0, 5.2 - 5.1, 5.3 - 5.2}) > 1
    assert rounded.p is None, "nor have those that differ by rounding"
    worse = compare_losses({0: 1.0, 1: 1.2, 2: 1.1}, {0: 2.0, 1: 2.1, 2: 2.3})
    assert worse.p is not None
    assert worse.p > 0.99


def test_the_interval_of_a_replay() -> None:
    pytest.importorskip("scipy")
    # t of 0.995 with two degrees of freedom: a sqrt(2 / (1 - a^2)), a = 0.99.
    half = 0.99 * math.sqrt(2 / (1 - 0.99**2)) * math.sqrt(4 / 3)
    assert predict_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half))
    assert predict_interval([1.0]) is None


def make_record(base: Path, losses: dict[int, float], **changes: Any) -> SpeedRecord:
    record = load_record(base / "home/records/first")
    runs = tuple(dataclasses.replace(record.runs[0], seed=seed, loss=loss) for seed, loss in losses.items())
    return dataclasses.replace(record, runs=runs, seeds=tuple(losses), **changes)


def test_a_record_has_to_beat_the_last_one_of_its_group(base: Path) -> None:
    pytest.importorskip("scipy")
    records = {
        "start": make_record(base, {0: 5.0, 1: 5.02, 2: 5.01}),
        "noise": make_record(base, {0: 4.9, 1: 5.05, 2: 5.0}),
        "better": make_record(base, {0: 4.8, 1: 4.821, 2: 4.812}),
        "alone": make_record(base, {0: 1.0}),
        "missing": dataclasses.replace(make_record(base, {0: 1.0, 1: 1.1}), seeds=(0, 1, 2)),
        "two": make_record(base, {0: 1.0, 1: 1.001}),
        "late": make_record(base, {0: 1.0, 1: 1.1}, track="timed"),
        "elsewhere": make_record(base, {0: 6.0, 1: 6.1, 2: 6.2}, data_sha256="other", idea="a | b\nc"),
        "more": make_record(base, {3: 4.6, 4: 4.602, 5: 4.601}),
    }
    groups = rank_records(records)
    found = {x.name: x for group in groups.values() for x in group}
    assert [len(group) for group in groups.values()] == [7, 1, 1]
    assert {name: x.problem for name, x in found.items()} == {
        "start": None,
        "noise": "not better with p < 0.01",
        "better": None,
        "alone": "1 of at least 3 seeds",
        "two": "2 of at least 3 seeds",
        "missing": "seeds 2 are missing",
        "late": f"{records['late'].excess:.1f} s over the limit",
        "elsewhere": None,
        "more": None,
    }
    assert found["better"].comparison == compare_losses(records["start"].losses, records["better"].losses)
    assert found["more"].comparison == compare_losses(records["better"].losses, records["more"].losses)
    table = describe_records(groups)
    assert table.count("| CPU or GPU |") == 3
    assert "| 2 | [better](records/better/record.json) | A tiny model. | 4.8110 ± 0.0105 | 3 | -0.1990, p = " in table
    assert "| a \\| b c |" in table
    assert "| - | [noise](records/noise/record.json)" in table
    picture = draw_records(groups)
    assert picture.count('class="dot"') == 4
    assert picture.count('class="no"') == 5
    assert "prefers-color-scheme: dark" in picture
    assert picture.count(">goal</text>") == 3


# ---- the page ----


def test_the_committed_page_is_that_of_the_committed_records() -> None:
    pytest.importorskip("scipy")
    home = ROOT / "speedrun"
    groups = rank_records(load_records(home))
    assert replace_table(home / "README.md", describe_records(groups)) == (home / "README.md").read_text()
    assert (home / "records.svg").read_text() == draw_records(groups)


def test_the_page_names_every_track_and_its_goal() -> None:
    page = (ROOT / "speedrun" / "README.md").read_text()
    assert {name for name in TRACKS if f"| `{name}` |" not in page} == {"tiny", "timed"}
    assert all(f"{track.goal:g}" in page for name, track in TRACKS.items() if track.goal and name != "tiny")
    assert {path.stem for path in (ROOT / "speedrun/data").iterdir()} <= DATA.keys()


def test_the_table_is_written_between_its_marks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    page = folder / "home" / "README.md"
    page.write_text("before\n")
    with pytest.raises(SpeedrunError, match="needs the lines <!-- written by"):
        write_table(folder / "home")
    page.write_text("before\n<!-- written by neobert speedrun table -->\nold\n<!-- end of the table -->\nafter\n")
    assert command("", ["table", "--home", str(folder / "home")]) == 0
    text = page.read_text()
    assert capsys.readouterr().out.strip() in text
    assert "old" not in text
    assert (text[:7], text[-6:]) == ("before\n", "after\n")
    assert (folder / "home" / "records.svg").read_text().startswith("<svg")
    write_record(folder / "home/records/first", make_record(folder, {0: 5.0, 1: 5.1}, track="tiny"))
    write_table(folder / "home")
    assert "5.0500" in page.read_text()


# ---- building data ----


def test_data_of_a_standard_library_are_built_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA, "tiny", StdlibExtract(version="3.0.1", num_held_out=2))
    home = make_folder(tmp_path / "home" / "data").parent
    for name in ("a.py", "b/c.py", "b/d.py", "e.py", "test/x.py", "_sysconfigdata_x.py", "config-3/y.py"):
        file = tmp_path / "Lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name} ü\n")
    call = ["data", "tiny", "--source", str(tmp_path / "Lib"), "--home", str(home), "--output"]
    assert command("", [*call, str(tmp_path / "one")]) == 0
    found = {split: (tmp_path / "one" / f"{split}.jsonl").read_text() for split in ("train", "validation")}
    assert {split: text.count("\n") for split, text in found.items()} == {"train": 2, "validation": 2}
    assert not any(name in "".join(found.values()) for name in ("x.py", "_sysconfigdata", "y.py"))
    assert command("", [*call, str(tmp_path / "two")]) == 0, "the first build has left a manifest"
    with pytest.raises(SpeedrunError, match="holds files already"):
        command("", [*call, str(tmp_path / "two")])
    (tmp_path / "Lib" / "a.py").write_text("# another version\n")
    with pytest.raises(
        SpeedrunError, match=r"is not tiny: .*\.jsonl has .*; use the folder Lib of CPython 3.0.1, https"
    ):
        command("", [*call, str(tmp_path / "three")])
    assert not any((tmp_path / "three").iterdir()), "the same command can be typed again"


def test_data_of_the_hub_are_built_from_a_local_copy(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files in the folder of a configuration, as wikimedia/wikipedia has them."""
    copy = make_folder(tmp_path / "wikipedia" / "20231101.en").parent
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: 20231101.en\n  data_files:\n  - split: train\n    path: 20231101.en/*\n---\n"
    )
    lines = [json.dumps({"id": str(n), "title": "x", "text": text}) + "\n" for n, text in enumerate(texts[:40])]
    (copy / "20231101.en" / "train-0.jsonl").write_text("".join(lines[:25]))
    (copy / "20231101.en" / "train-1.jsonl").write_text("".join(lines[25:]))
    entry = HubExtract(name=str(copy), config="20231101.en", revision=None, num_documents=30, every=10)
    monkeypatch.setitem(DATA, "tiny", entry)
    home = make_folder(tmp_path / "home" / "data").parent
    (said,) = build_data(TINY, tmp_path / "out", home)
    assert "built for the first time" in said
    found = [json.loads(x)["text"] for x in (tmp_path / "out" / "validation.jsonl").read_text().splitlines()]
    assert found == [texts[0], texts[10], texts[20]]
    assert (tmp_path / "out" / "train.jsonl").read_text().count("\n") == 27
    monkeypatch.setitem(DATA, "tiny", dataclasses.replace(entry, num_documents=41))
    with pytest.raises(SpeedrunError, match="has 40 documents with text, and 41 are needed"):
        build_data(TINY, tmp_path / "more", home)
    assert not list((tmp_path / "more").iterdir())


def test_files_that_nothing_builds(tmp_path: Path) -> None:
    with pytest.raises(SpeedrunError, match="the data of tiny cannot be built: made by a test"):
        build_data(TINY, tmp_path / "out", tmp_path)
