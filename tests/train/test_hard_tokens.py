"""Runs whose masks follow what the model predicts: resumed, in two processes, read ahead, proven."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import call
from children import run_in_two
from records import assert_same_run, exact_steps, log_lines
from safetensors.torch import load_file, save_file
from small_corpus import OBJECTS, SUBJECTS, VERBS
from tokenizers import Tokenizer

from neobert.cli import EXIT_CODES
from neobert.commands.replay import replay_row
from neobert.config.schema import Config
from neobert.data.pipeline import DataPipeline
from neobert.errors import DataError, StartupError
from neobert.train.checkpoint.proof.retrain import read_batches
from neobert.train.checkpoint.proof.stretches import Segment
from neobert.train.loop import pretrain
from neobert.train.probes.hard_tokens import HARD_TOKENS_FILE, HardTokens
from neobert.train.run import build_run
from neobert.types import StepBatch

Tiny = Callable[..., Config]
ADAPTIVE = ["datacollator.mask_weights=adaptive", "datacollator.mask_weights_steps=4", "trainer.eval_steps=6"]
FILES = ("model.safetensors", HARD_TOKENS_FILE)


def resume(tiny: Tiny, out: Path, *keys: str) -> None:
    pretrain(tiny(out, *keys, "trainer.resume_from_checkpoint=latest"))


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, three intervals, with a checkpoint of each step; dropout shows that measuring draws nothing."""
    out = tmp_path_factory.mktemp("hard") / "run"
    pretrain(tiny(out, *ADAPTIVE, "model.dropout_prob=0.1", "trainer.save_steps=1"))
    return out


def test_the_first_interval_is_that_of_uniform_masks_and_later_ones_are_not(
    tiny: Tiny, tmp_path: Path, whole: Path
) -> None:
    pretrain(tiny(tmp_path / "run", "model.dropout_prob=0.1", "trainer.eval_steps=6"))
    uniform, adaptive = exact_steps(tmp_path / "run"), exact_steps(whole)
    assert uniform[:4] == adaptive[:4]
    differ = [a[-1] != b[-1] for a, b in zip(uniform, adaptive, strict=True)]
    assert any(differ[4:8])
    assert all(differ[8:])
    targets = [[x["num_targets"] for x in log_lines(run, "step")] for run in (tmp_path / "run", whole)]
    assert targets[0] == targets[1], "how many are hidden does not follow the weights"
    evals = [[(x["step"], x["num_targets"]) for x in log_lines(run, "eval")] for run in (tmp_path / "run", whole)]
    assert evals[0] == evals[1]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("ahead", [["dataset.num_workers=0"], ["dataset.prefetch_factor=20"]], ids=["none", "twenty"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny: Tiny, tmp_path: Path, whole: Path, step: int, ahead: list[str]
) -> None:
    out = tmp_path / "run"
    start = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / str(step)}"
    pretrain(tiny(out, *ADAPTIVE, "model.dropout_prob=0.1", *ahead, start))
    assert exact_steps(out) == exact_steps(whole, after=step)
    for file in FILES:
        a, b = (load_file(run / "checkpoints" / "12" / file) for run in (out, whole))
        assert all(bool((a[name] == b[name]).all()) for name in a.keys() | b.keys())


@pytest.mark.parametrize(
    "keys",
    [
        ["trainer.objective=mlm_jepa", "trainer.ema_decay=0.9", "dataset.persistent_workers=false"],
        ["datacollator.clm_steps=3", "datacollator.mlm_rate=random", "trainer.gradient_accumulation_steps=2"],
        ["datacollator.mask_weights_steps=2", "datacollator.mlm_probability_final=0.1", "trainer.async_save=true"],
        ["trainer.torch_compile=true", "trainer.torch_compile_backend=eager", "trainer.log_statistics=true"],
        ["trainer.mixed_precision=bf16", "trainer.bf16_residual=true", "model.decoder_bias=true"],
    ],
    ids=[
        "jepa, loaders closed",
        "clm, random rates, accumulation",
        "intervals of two, saved in the background",
        "compiled",
        "bf16",
    ],
)
def test_beside_other_keys(tiny: Tiny, tmp_path: Path, keys: list[str]) -> None:
    one, parts = tmp_path / "one", tmp_path / "parts"
    more = ["datacollator.mlm_probability_final_step=9"] if any("final" in key for key in keys) else []
    keys = [*ADAPTIVE, "trainer.save_steps=3", "trainer.eval_steps=3", *keys, *more]
    pretrain(tiny(one, *keys, "trainer.max_steps=9"))
    pretrain(tiny(parts, *keys, "trainer.max_steps=3", "scheduler.total_steps=9", "trainer.eval_steps=3"))
    resume(tiny, parts, *keys, "trainer.max_steps=9")
    assert_same_run(parts, one, step=9, files=FILES)


def test_a_student_has_masks_that_follow_it(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    out, keys = tmp_path / "run", [*ADAPTIVE, "trainer.objective=distill", f"distill.teacher={whole}"]
    keys += ["trainer.max_steps=6", "trainer.save_steps=3"]
    pretrain(tiny(out, *keys))
    pretrain(tiny(tmp_path / "again", *keys, f"trainer.resume_from_checkpoint={out / 'checkpoints' / '3'}"))
    assert exact_steps(tmp_path / "again") == exact_steps(out, after=3)
    assert load_file(out / "checkpoints" / "6" / HARD_TOKENS_FILE)["after"][1].sum() > 0


def test_two_processes_equal_one(tiny: Tiny, tmp_path: Path) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    batch = [*ADAPTIVE, "trainer.global_batch_size=8", "trainer.save_steps=3"]
    pretrain(tiny(one, *batch))
    config = tiny(two, *batch, "trainer.per_device_train_batch_size=2")
    run_in_two(lambda: EXIT_CODES[pretrain(config).reason], tmp_path)
    fields = ("step", "num_targets", "batch_digest")
    lines = [[tuple(x[name] for name in fields) for x in log_lines(run, "step")] for run in (one, two)]
    assert lines[0] == lines[1]
    saved = [load_file(run / "checkpoints" / "3" / HARD_TOKENS_FILE) for run in (one, two)]
    assert saved[0]["counted"][1].sum() > 0, "a part of a measurement is in it"
    assert all(bool((saved[0][name] == saved[1][name]).all()) for name in saved[0])
    pretrain(tiny(three, *batch, f"trainer.resume_from_checkpoint={two / 'checkpoints' / '3'}"))
    assert [tuple(x[name] for name in fields) for x in log_lines(three, "step")] == lines[0][3:]


def test_a_loader_waits_for_the_weights_and_can_be_closed(tiny: Tiny, tmp_path: Path) -> None:
    run = build_run(tiny(tmp_path / "run", *ADAPTIVE, "dataset.prefetch_factor=20"))
    assert run.hard_tokens is not None
    weights, data = run.hard_tokens.weights, run.data
    loader = data.loader()
    batches = [next(loader) for _ in range(3)]  # The fourth needs the digest of the fifth, whose weights are missing.
    started = threading.Event()

    def ask() -> None:
        started.set()
        batches.append(next(loader))

    asking = threading.Thread(target=ask)
    asking.start()
    started.wait()
    time.sleep(0.3)
    assert len(batches) == 3
    weights.refresh(2, np.ones((2, weights.num_tokens), dtype=np.int64))
    asking.join(10)
    assert len(batches) == 4
    loader.close()  # Its thread waits for the third interval.
    assert not any(thread.name == "batches" for thread in threading.enumerate())
    run.runtime.close()


def test_without_training_later_rows_are_refused(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    log = {x["step"]: x for x in log_lines(whole, "step")}
    (tmp_path / "work").mkdir()
    assert read_batches(whole, Segment(1, 3), log, work=tmp_path / "work") is None
    (tmp_path / "more").mkdir()
    with pytest.raises(DataError, match=r"mask_weights: adaptive: these batches cannot be read.*leave out --limit"):
        read_batches(whole, Segment(3, 8), log, work=tmp_path / "more")
    assert "row 9 (step 3)" in replay_row(whole, 9).describe()
    with pytest.raises(DataError, match=r"the masks of step 8 follow .*read rows of the first 4 steps"):
        replay_row(whole, 30)
    run = build_run(tiny(tmp_path / "run", *ADAPTIVE, "dataset.num_workers=0"))
    assert isinstance(run.data, DataPipeline)
    loader = replace(run.data, loader_settings=replace(run.data.loader_settings, is_ready=lambda step: True)).loader()
    assert [len(next(loader).micro_batches) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(DataError, match=r"mask_weights: adaptive: the masks of step 5 .*write datacollator"):
        list(loader)
    run.runtime.close()


def test_its_record_holds_and_a_changed_count_is_found(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, *ADAPTIVE, "trainer.save_steps=6", "trainer.fill_mask_texts=[]"))
    assert call("prove.py", out, "--from-start") == 0
    assert "bit-identical" in capsys.readouterr().out
    log = out / "log.jsonl"
    kept = log.read_text()
    *_, late = (line for line in kept.splitlines() if json.loads(line)["kind"] == "step")
    digest = json.loads(late)["batch_digest"]
    log.write_text(kept.replace(digest, f"{int(digest, 16) ^ 1:016x}"))
    assert call("prove.py", out, "--from-start") == 1, "masks of a later interval, on the machine that drew them"
    log.write_text(kept)
    capsys.readouterr()
    path = out / "checkpoints" / "12" / HARD_TOKENS_FILE
    saved = load_file(path)
    saved["after"][0, 7] += 1
    save_file(saved, path, metadata={"format": "pt"})
    assert call("prove.py", out) == 1
    assert f"{HARD_TOKENS_FILE}: after" in capsys.readouterr().out


def test_counts_of_another_vocabulary_are_named(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, *ADAPTIVE, "trainer.max_steps=4", "scheduler.total_steps=12"))
    path = out / "checkpoints" / "4" / HARD_TOKENS_FILE
    save_file({name: tensor[:, 1:].clone() for name, tensor in load_file(path).items()}, path)
    (path.parent / "manifest.json").unlink()  # It knows the sizes of files.
    with pytest.raises(StartupError, match=rf"{HARD_TOKENS_FILE} has .*, and this run needs .*; name another"):
        pretrain(tiny(tmp_path / "next", *ADAPTIVE, f"trainer.resume_from_checkpoint={path.parent}"))


def test_switched_on_and_off_by_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=4", "scheduler.total_steps=12"))
    assert not (out / "checkpoints" / "4" / HARD_TOKENS_FILE).exists()
    with pytest.raises(StartupError, match=r"datacollator.mask_weights +needs declaring +\"uniform\" -> \"adaptive\""):
        resume(tiny, out, *ADAPTIVE, "scheduler.total_steps=12")
    allow = "trainer.resume_allow=[datacollator.mask_weights,datacollator.mask_weights_steps]"
    resume(tiny, out, *ADAPTIVE, allow, "trainer.max_steps=8", "scheduler.total_steps=12")
    assert load_file(out / "checkpoints" / "8" / HARD_TOKENS_FILE)["after"].sum() > 0
    resume(tiny, out, allow, "trainer.max_steps=12")
    assert not (out / "checkpoints" / "12" / HARD_TOKENS_FILE).exists()


def test_hard_tokens_are_hidden_more_after_a_refresh(
    tiny: Tiny, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the words are one that is soon predicted; the others are drawn evenly from many."""
    tokenizer, rng = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")), np.random.default_rng(0)
    easy = " the"
    hard = [f" {word}" for text in (*SUBJECTS, *VERBS, *OBJECTS) for word in text.split() if word != "the"]
    hard = sorted(word for word in set(hard) if len(tokenizer.encode(word, add_special_tokens=False).ids) == 1)
    assert len(hard) > 10
    documents = [easy * 30 if number % 2 else "".join(rng.choice(hard, 30)) for number in range(200)]
    (tmp_path / "planted.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (easy_id,) = tokenizer.encode(easy, add_special_tokens=False).ids
    hidden: list[float] = []

    def record(self: HardTokens, step: int, batch: StepBatch) -> None:
        measure(self, step, batch)
        targets = torch.cat([micro.targets[micro.targets >= 0] for micro in batch.micro_batches])
        hidden.append(float((targets == easy_id).float().mean()))

    measure = HardTokens.measure
    monkeypatch.setattr(HardTokens, "measure", record)
    keys = [f"dataset.path={tmp_path / 'planted.jsonl'}", "datacollator.mask_weights_steps=20", "optimizer.lr=2e-2"]
    keys += ["trainer.eval_strategy=no", "trainer.max_steps=60", "datacollator.mask_all=true"]
    pretrain(tiny(tmp_path / "run", *ADAPTIVE, *keys))
    first, last = np.mean(hidden[:20]), np.mean(hidden[40:])
    assert first == pytest.approx(0.5, abs=0.08)
    assert last < first / 2
