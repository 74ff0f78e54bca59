"""The command line that looks after checkpoints, and the one that shows a row."""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import call
from records import log_lines

from neobert.benchmark import kill_storm
from neobert.commands.inspect_checkpoints import list_run
from neobert.commands.replay import replay_row
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train import loop
from neobert.train.loop import pretrain
from neobert.weights.folder import CheckpointError, checkpoint_steps

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(tiny(out, "trainer.save_milestone_steps=[6]"))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("checkpoint.py", "verify", str(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["4", "6", "8", "12"]
    assert all(": whole, 12 files, " in line or ": whole, 11 files, " in line for line in lines)
    assert call("checkpoint.py", "verify", str(run / "checkpoints" / "8")) == 0
    assert capsys.readouterr().out.startswith("8: whole")
    path = run / "checkpoints" / "8" / "optimizer.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(bytes(content))
    assert call("checkpoint.py", "verify", str(run)) == 1
    assert "8: DAMAGED, optimizer.bin does not match its sha256" in capsys.readouterr().out
    assert call("checkpoint.py", "verify", str(run / "nowhere")) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_list(run: Path) -> None:
    os.truncate(run / "checkpoints" / "8" / "model.safetensors", 10)
    lines = list_run(run, now=(run / "checkpoints" / "4").stat().st_mtime + 7200)
    header, four, six, eight, twelve = (line.split(maxsplit=5) for line in lines)
    losses = {x["step"]: f"{x['loss']:.4f}" for x in log_lines(run, "eval")}
    assert header[:2] == ["step", "MB"]
    assert [four[0], *four[2:5]] == ["4", "2", "h", losses[4]]
    assert (six[4], six[5]) == ("-", "milestone"), "that step was not evaluated"
    assert eight[1] == "?"
    assert "damaged: model.safetensors is 10 bytes" in " ".join(eight)
    assert twelve[4:] == [losses[12], "best"]


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("checkpoint.py", "prune", str(run)) == 0, "trainer.save_total_limit is null here"
    assert "deleted: nothing" in capsys.readouterr().out
    assert call("checkpoint.py", "prune", str(run), "--keep", "1", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == ["would delete: 4, 8", "kept: 6, 12"]
    assert checkpoint_steps(run) == [4, 6, 8, 12]
    assert call("checkpoint.py", "prune", str(run), "--keep", "1") == 0
    assert checkpoint_steps(run) == [6, 12]


def test_diff(tiny: Tiny, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    pretrain(tiny(other, "trainer.max_steps=4", "optimizer.lr=1e-3", "seed=9"))
    capsys.readouterr()
    assert call("checkpoint.py", "diff", str(run / "checkpoints" / "4"), str(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}/checkpoints/4 -> {run}/checkpoints/12"
    assert lines[1] == "  step: 4 -> 12"
    assert lines[-1] == "  the same settings, data and tokenizer"
    assert call("checkpoint.py", "diff", str(run), str(other)) == 0
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert table["seed"] == ["needs", "declaring", "3", "->", "9"]
    assert table["optimizer.lr"] == ["schedule", "0.01", "->", "0.001"]


# ---- replay ----


@pytest.mark.parametrize("data", [[], ["dataset.streaming=false", "dataset.num_lanes=3"]], ids=["stream", "indexed"])
def test_a_replayed_row_is_the_row_that_was_trained_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: list[str]
) -> None:
    seen = {}
    real = loop.train_step

    def train_step(model, optimizer, batches, **more):  # type: ignore[no-untyped-def]
        for batch in batches:
            length = batch.input_ids.shape[1]
            for number, key in enumerate(batch.row_keys.tolist()):
                chosen = [
                    (slot - number * length, target)
                    for slot, target in zip(batch.masked_index.tolist(), batch.targets.tolist())
                    if target >= 0 and slot // length == number
                ]
                seen[key] = (batch.input_ids[number].tolist(), batch.positions[number].tolist(), chosen)
        return real(model, optimizer, batches, **more)

    monkeypatch.setattr(loop, "train_step", train_step)
    out = tmp_path / "run"
    pretrain(tiny(out, *data))
    for row in (0, 5, 17, 33, 47):
        replayed = replay_row(out, row)
        ids, positions, chosen = seen[row]
        assert replayed.batch.input_ids[0].tolist() == ids
        assert replayed.batch.positions[0].tolist() == positions
        targets = zip(replayed.batch.masked_index.tolist(), replayed.batch.targets.tolist())
        assert [(slot, target) for slot, target in targets if target >= 0] == chosen
        assert replayed.step == row // 4 + 1
        text = replayed.describe()
        assert text.startswith(f"row {row} (step {row // 4 + 1}): ")
        assert f"mask: {len(chosen)} tokens are predicted" in text
    assert replay_row(out, 60).row.key == 60, "rows that are still to come are planned already"
    assert replay_row(out / "checkpoints" / "4", 3).row.key == 3


def test_rows_that_cannot_be_replayed(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        replay_row(tmp_path / "nowhere", 0)
    out, data = tmp_path / "run", tmp_path / "data"
    pretrain(tiny(out, "trainer.max_steps=1", "trainer.enforce_full_packed_batches=false"))
    with pytest.raises(StartupError, match="packs each micro-batch by itself"):
        replay_row(out, 0)
    shutil.copytree(corpus, data)
    changed = tmp_path / "changed"
    pretrain(tiny(changed, "trainer.max_steps=1", f"dataset.path={data}"))
    with (data / "part-0.jsonl").open("a") as handle:
        handle.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(StartupError, match="the data under this run changed"):
        replay_row(changed, 0)


# ---- the storm ----


@pytest.mark.full
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["trainer.async_save=true", "--into-saves", "0.5"],
        ["--processes", "2", "--launcher", "--into-saves", "0.6", "trainer.parallel=fsdp2", "trainer.max_steps=40"],
    ],
)
def test_a_storm_of_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert call("kill_storm.py", tmp_path / "storm", "--kills", 5, *more) == 0
    lines = capsys.readouterr().out.splitlines()
    pattern = re.compile(r"5 kills in (\d+) storms: \1 equal to the one left alone, bit for bit")
    assert any(map(pattern.fullmatch, lines[-2:]))


def test_what_a_kill_interrupts_and_which_kills_are_drawn(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".tmp-4-of-the-life-before"
    leftover.mkdir(parents=True)
    before = kill_storm.look(tmp_path)
    assert kill_storm.find_phase(tmp_path, before) == "starting"
    (tmp_path / "log.jsonl").write_text("a step")
    assert kill_storm.find_phase(tmp_path, before) == "training"
    (tmp_path / "checkpoints" / ".tmp-8-of-this-one").mkdir()
    assert kill_storm.find_phase(tmp_path, before) == "saving"
    drawn = [kill_storm.draw_kill(random.Random(seed), launcher=True, into_saves=0.5) for seed in range(60)]
    assert {(x.of_launcher, x.signal, x.after == "save") for x in drawn} == {
        *((False, signal.SIGKILL, into) for into in (True, False)),
        *((True, number, into) for number in (signal.SIGKILL, signal.SIGTERM) for into in (True, False)),
    }
    alone = [kill_storm.draw_kill(random.Random(seed), launcher=False, into_saves=0.0) for seed in range(9)]
    assert {(x.of_launcher, x.after) for x in alone} == {(False, "start")}


def test_a_storm_that_changed_something_is_seen(tmp_path: Path) -> None:
    """The comparison itself: a step line and a bit of the weights."""
    run = tmp_path / "run"
    (run / "checkpoints" / "300").mkdir(parents=True)
    weights = run / "checkpoints" / "300" / "model.safetensors"
    weights.write_bytes(b"abc")
    line = {"kind": "step", "step": 1, "loss_hex": "0x1p0", "grad_norm_hex": "0x1p1", "lr": 0.1}
    line |= {"num_tokens": 5, "num_targets": 2, "batch_digest": "0" * 16}
    (run / "log.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"kind": "eval", "step": 1}) + "\n")
    steps, digest = kill_storm.read_steps(run), kill_storm.digest_of_weights(run)
    assert steps == [(1, "0x1p0", "0x1p1", 0.1, 5, 2, "0" * 16)]
    (run / "log.jsonl").write_text(json.dumps({**line, "loss_hex": "0x1p1"}) + "\n")
    weights.write_bytes(b"abd")
    assert kill_storm.read_steps(run) != steps
    assert kill_storm.digest_of_weights(run) != digest
    assert kill_storm.Storm(different_steps=1, same_weights=True).survived is False
