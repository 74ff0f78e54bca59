"""Checks of `gpu_check` that are whole runs of training, and the tests of a checkout."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from neobert.benchmark.gpu.gpu_table import Bench, CannotRun, Found, NotAsExpected
from neobert.benchmark.profile_analysis import IDLE, analyse_path
from neobert.benchmark.trial import read_speed
from neobert.config.load import config_to_yaml, load_config, load_saved_config
from neobert.config.schema import Config
from neobert.inference.model import load
from neobert.train.loop import pretrain

_TINY = (
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=48",
    "model.max_position_embeddings=64",
    "dataset.max_seq_length=64",
    "trainer.per_device_train_batch_size=2",
    "trainer.per_device_eval_batch_size=2",
    "trainer.mixed_precision=no",
    "trainer.torch_compile=false",
    "trainer.torch_compile_backend=eager",
    "trainer.device=cpu",
)
"""Of a dry run, which compiles where that is what is checked."""


def build_config(bench: Bench, name: str, *overrides: str) -> Config:
    """The quickstart on a small text, compiled, in a folder of the check."""
    text = _write_text(bench)
    return load_config(
        "quickstart",
        [
            "dataset.name=null",
            f"dataset.path={text}",
            "dataset.eval_samples=8",
            "tokenizer.vocab_size=500",
            "trainer.torch_compile=true",
            "trainer.disable_tqdm=true",
            "trainer.resume_from_checkpoint=null",
            "trainer.logging_steps=2",
            "trainer.eval_steps=0",
            "trainer.save_steps=0",
            f"trainer.output_dir={bench.folder / name}",
            *bench.size((), _TINY),
            *overrides,
        ],
    )


def _write_text(bench: Bench) -> Path:
    """The beginnings of some modules of Python's standard library, which every machine has, as JSONL."""
    path = bench.folder / "train.jsonl"
    if not path.exists():
        count, length = bench.size((80, 4000), (30, 400))  # Files and characters of each.
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:count]
        texts = [file.read_text(encoding="utf-8", errors="replace")[:length] for file in files]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
    return path


def _train(config: Config) -> None:
    """Raises NotAsExpected when the run does not finish."""
    torch.compiler.reset()
    result = pretrain(config)
    if result.reason != "finished":
        raise NotAsExpected(f"the run ended with {result.reason} at step {result.state.step}")


def read_log(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Of the log of a run."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def check_run(bench: Bench) -> Found:
    """A run with evaluations and saves, a resume of it, and what its model answers."""
    found, steps = Found(), bench.size(120, 6)
    keys = [f"trainer.max_steps={steps}", f"trainer.eval_steps={steps // 2}", f"trainer.save_steps={steps // 2}"]
    counters.clear()
    _train(build_config(bench, "run", *keys))
    run = bench.folder / "run"
    losses = [line["loss"] for line in read_log(run)]
    evaluations = [line["loss"] for line in read_log(run, "eval")]
    found.add(
        "run",
        f"{steps} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}, held-out {evaluations[-1]:.3f}, "
        f"{read_speed(run).tokens_per_second:,.0f} real tokens/s, {counters['stats']['unique_graphs']} graphs",
        losses=[losses[0], losses[-1]],
        evaluations=evaluations,
        graphs=counters["stats"]["unique_graphs"],
    )
    shutil.rmtree(run / "checkpoints" / str(steps))
    _train(build_config(bench, "run", *keys, "trainer.resume_from_checkpoint=latest"))
    resumed = [line["loss"] for line in read_log(run)]
    gap = max(abs(a - b) / abs(b) for a, b in zip(resumed, losses))
    found.add("resume", f"from step {steps // 2}: losses differ by at most {gap:.1e} of their size", difference=gap)
    model = load(run, device=bench.device, dtype=bench.size("bf16", "fp32"))
    hidden = model.hidden_states(["import os", "for i in range(10):"])
    if not all(states.isfinite().all() for states in hidden) or len(resumed) != steps or gap > 0.05:
        raise NotAsExpected(f"{len(resumed)} of {steps} steps after the resume; hidden states: {hidden}", found)
    found.add("use", f"{model.fill_mask(['for i in [MASK](10):'])[0].describe()[:120]!r}")
    return found


_EXACT = ("step", "loss_hex", "grad_norm_hex", "batch_digest")


def check_equality(bench: Bench) -> Found:
    """Two runs, and a resume of a copy of the first, bit by bit."""
    keys = [
        "trainer.deterministic=true",
        "trainer.torch_compile=true",
        "model.dropout_prob=0.1",
        "trainer.max_steps=8",
        "trainer.save_steps=4",
        "trainer.save_total_limit=null",
    ]
    for name in ("first", "second"):
        _train(build_config(bench, name, *keys))
    shutil.copytree(bench.folder / "first", bench.folder / "resumed")
    shutil.rmtree(bench.folder / "resumed" / "checkpoints" / "8")
    _train(build_config(bench, "resumed", *keys, "trainer.resume_from_checkpoint=latest"))
    found, want = Found(), _exact(bench.folder / "first")
    for name in ("second", "resumed"):
        steps, weights = _exact(bench.folder / name)
        same = [a == b for a, b in zip(steps, want[0], strict=True)]
        found.add(
            name, f"{sum(same)} of {len(same)} steps equal, weights {'equal' if weights == want[1] else 'differ'}"
        )
        if not all(same) or weights != want[1]:
            first = f"the first step that differs is {same.index(False) + 1}" if not all(same) else "weights differ"
            raise NotAsExpected(f"{name}: {first}", found)
    return found


def _exact(run: Path) -> tuple[list[tuple[Any, ...]], bytes]:
    steps = [tuple(line[key] for key in _EXACT) for line in read_log(run)]
    return steps, (run / "checkpoints" / "8" / "model.safetensors").read_bytes()


def check_micro_batch(bench: Bench) -> Found:
    """The number that `auto` finds, and a step with it."""
    keys = ["trainer.per_device_train_batch_size=auto", "trainer.max_steps=1"]
    paper = [
        "model.hidden_size=768",
        "model.num_hidden_layers=28",
        "model.num_attention_heads=12",
        "model.intermediate_size=3072",
        "model.max_position_embeddings=1024",
        "dataset.max_seq_length=1024",
        "tokenizer.vocab_size=2000",
        "trainer.mixed_precision=bf16",
        "trainer.save_model=false",
    ]
    rows = bench.size(1024, 8)
    _train(build_config(bench, "run", *keys, f"trainer.global_batch_size={rows}", *bench.size(paper, [])))
    chosen = load_saved_config(bench.folder / "run" / "config.yaml").trainer.micro_batch_rows
    peak = 0 if bench.dry else torch.cuda.max_memory_reserved()
    found = Found()
    text = f"auto is {chosen} of {rows} rows; {peak / 2**30:.1f} GiB reserved in the run"
    found.add("micro-batch", text, rows=chosen, reserved_bytes=peak)
    return found


def check_profiler(bench: Bench) -> Found:
    """The trace of a run, and what its analysis says."""
    keys = ["trainer.max_steps=8", "trainer.profiler_steps_start=6", "trainer.profiler_steps=2"]
    _train(build_config(bench, "run", *keys))
    analysis = analyse_path(bench.folder / "run")
    found = Found()
    parts = ", ".join(f"{name} {part:.1%}" for name, part in analysis.shares.items() if part >= 5e-4)
    found.add("trace", f"of {analysis.device}, {analysis.milliseconds_per_step:.1f} ms a step: {parts}")
    missing = [name for name in ("GEMM", "loss", "optimizer", IDLE) if not analysis.shares[name] > 0]
    if analysis.device != bench.device or missing or not math.isclose(sum(analysis.shares.values()), 1, abs_tol=1e-6):
        raise NotAsExpected(f"of {analysis.device}, without {', '.join(missing) or 'a missing kind'}", found)
    return found


def check_muonclip(bench: Bench) -> Found:
    """What is seldom on, all at once."""
    keys = [
        "trainer.max_steps=8",
        "optimizer.name=muonclip",
        "optimizer.muon_config.clipping_interval=2",
        "trainer.skip_spikes=6",
        "trainer.ema_decay=0.9",
        "trainer.log_statistics=true",
        "trainer.save_steps=8",
    ]
    _train(build_config(bench, "run", *keys))
    run = bench.folder / "run"
    losses = [line["loss"] for line in read_log(run)]
    average = load(run, device=bench.device, weights="ema").hidden_states(["import os"])[0]
    found = Found()
    found.add("run", f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}", losses=losses)
    if not all(map(math.isfinite, losses)) or not average.isfinite().all():
        raise NotAsExpected(f"losses {losses}, hidden states of the average {average}", found)
    return found


# --- several GPUs ----------------------------------------------------------------------------------------------------


def check_two_gpus(bench: Bench) -> Found:
    """One process trains; two resume a copy of its run half-way and have to make its losses again, each on a GPU of its
    own. Twice: with gradients that DistributedDataParallel reduces, and with master weights, whose are reduced here."""
    keys = ["trainer.max_steps=8", "trainer.save_steps=4", "trainer.save_total_limit=null"]
    keys += ["trainer.global_batch_size=16", "trainer.per_device_train_batch_size=4", "trainer.mixed_precision=bf16"]
    found = Found()
    for name in ("false", "true"):
        _check_resume_by_two(bench, found, f"trainer.bf16_residual={name}", keys)
    return found


def _check_resume_by_two(bench: Bench, found: Found, variant: str, keys: list[str]) -> None:
    bench = Bench(device=bench.device, folder=bench.folder / variant)
    bench.folder.mkdir()
    _train(build_config(bench, "one", *keys, variant))
    shutil.copytree(bench.folder / "one", bench.folder / "two")
    shutil.rmtree(bench.folder / "two" / "checkpoints" / "8")
    config = build_config(bench, "two", *keys, variant, "trainer.resume_from_checkpoint=latest")
    file = bench.folder / "two.yaml"
    file.write_text(config_to_yaml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    _run_quietly([*launcher, "-m", "neobert.benchmark.gpu.gpu_rank", str(file), str(bench.folder)], seconds=240)
    one, two = ([line["loss"] for line in read_log(bench.folder / name)] for name in ("one", "two"))
    gap = max(abs(a - b) / abs(b) for a, b in zip(two, one, strict=True))
    contexts = [json.loads((bench.folder / f"contexts-{rank}.json").read_text()) for rank in (0, 1)]
    text = f"losses differ from those of one process by at most {gap:.1e} of their size; GPUs by process: {contexts}"
    found.add(f"two processes, {variant}", text, difference=gap, contexts=contexts)
    if gap > 0.01 or contexts != [[0], [1]]:
        raise NotAsExpected(f"{variant}: one process: {one}; two: {two}; GPUs by process: {contexts}", found)


def _run_quietly(command: Sequence[str], *, seconds: float) -> None:
    """Its output is in the log. Raises NotAsExpected when it fails."""
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            process.send_signal(signal.SIGTERM)  # The launcher ends its processes then.
            raise NotAsExpected(f"{' '.join(command)} did not end within {seconds:.0f} s") from error
    if code:
        raise NotAsExpected(f"{' '.join(command)} ended with {code}; the log has its output")


# --- tests -----------------------------------------------------------------------------------------------------------


def check_gpu_tests(bench: Bench) -> Found:
    """The tests that need a GPU; in a dry run those of one folder, which are skipped."""
    return _run_tests(bench, bench.size("", "kernels"), "-m", "gpu")


def check_trainer_tests(bench: Bench) -> Found:
    """The tests of the trainer, on the device; in a dry run one file."""
    return _run_tests(bench, bench.size("train", "train/test_step.py"), "-m", "not full")


class _Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            self.failed += [report.nodeid] if report.failed else []


def _run_tests(bench: Bench, part: str, *flags: str) -> Found:
    import pytest

    tests = Path(__file__).parents[3] / "tests"
    if not (tests / "conftest.py").exists():
        raise CannotRun("the tests are not at hand: run it in a checkout")
    os.environ["NEOBERT_TEST_DEVICE"] = bench.device
    outcomes = _Outcomes()
    options = ["-o", "addopts=", "-q", "-p", "no:cacheprovider", "--strict-markers", "--basetemp"]
    code = pytest.main([*options, str(bench.folder / "pytest"), *flags, str(tests / part)], plugins=[outcomes])
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.counts.items()))
    if outcomes.failed or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise NotAsExpected(f"pytest ended with {int(code)}, {counts}: {', '.join(outcomes.failed[:20])}")
    found = Found()
    found.add("pytest", counts or "no test was collected", **outcomes.counts)
    return found
