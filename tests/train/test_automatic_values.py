"""`auto` becomes a value when a run is built: chosen by measuring, written into its config, kept by every resume."""

import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from records import exact_steps

from neobert.commands.preprocess import preview
from neobert.config.load import load_config, save_config
from neobert.config.schema import Config
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import StartupError
from neobert.train.build import choose_rows_per_step
from neobert.train.hardware import device, micro_batch
from neobert.train.hardware import machine as precision
from neobert.train.hardware import memory as host_memory
from neobert.train.hardware.micro_batch import (
    build_full_rows,
    choose_by_line,
    choose_by_trial,
    choose_kept,
    divisors,
)
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
GIB = 2**30
PRECISION = "trainer.mixed_precision=auto"
ROWS = ["trainer.per_device_train_batch_size=auto", "trainer.global_batch_size=12"]


def fail(*args: Any, **named: Any) -> Any:
    raise AssertionError("nothing is measured here")


def rates(monkeypatch: pytest.MonkeyPatch, *, fp32: float, bf16: float) -> None:
    measured = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(device, "measure_product", lambda rows, inner, outer, dtype: measured[dtype])


# ---- precision ----


def test_bf16_is_used_where_its_products_are_clearly_faster() -> None:
    assert [device.choose_faster(fp32=100, bf16=b) for b in (10, 100, 119, 120, 450)] == [
        "no",
        "no",
        "no",
        "bf16",
        "bf16",
    ]


def test_the_measured_rate_is_a_number_of_operations_a_second() -> None:
    assert 1e6 < device.measure_product(64, 64, 64, torch.float32) < 1e15


def test_a_slow_product_is_measured_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of a second a row: the sixteen of the first products are enough, and 2,048 would take 20 seconds."""
    rows = []

    def take(a: torch.Tensor, b: torch.Tensor) -> float:
        rows.append(len(a))
        return len(a) / speed

    monkeypatch.setattr(device, "_time_product", take)
    for speed, most in ((100, 16), (2_000, 200), (1e9, 2048)):
        rows.clear()
        assert device.measure_product(2048, 4, 8, torch.float32) == pytest.approx(2 * 4 * 8 * speed)
        assert (rows[:2], max(rows)) == ([16, 16], most)


@pytest.mark.parametrize(("bf16", "choice"), [(50e9, "no"), (400e9, "bf16")])
def test_a_run_binds_its_precision_and_a_resume_keeps_it(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bf16: float,
    choice: str,
) -> None:
    explicit, chosen, resumed = tmp_path / "explicit", tmp_path / "chosen", tmp_path / "resumed"
    rates(monkeypatch, fp32=100e9, bf16=bf16)
    pretrain(tiny(explicit, f"trainer.mixed_precision={choice}", "trainer.max_steps=8"))
    pretrain(tiny(chosen, PRECISION, "trainer.max_steps=8"))
    assert exact_steps(chosen) == exact_steps(explicit)
    assert load_config(chosen / "config.yaml") == load_config(
        explicit / "config.yaml", [f"trainer.output_dir={chosen}"]
    )
    said = (
        f"trainer.mixed_precision: auto is {choice}: products of up to 2048 x 32 x 48 make {bf16 / 1e9:.1f} GFLOP/s "
        "in bf16 and 100.0 in fp32"
    )
    assert said in capsys.readouterr().out

    monkeypatch.setattr(device, "measure_product", fail)
    pretrain(
        tiny(resumed, PRECISION, "trainer.max_steps=8", f"trainer.resume_from_checkpoint={chosen / 'checkpoints/4'}")
    )
    assert exact_steps(resumed) == exact_steps(chosen, after=4)
    assert load_config(resumed / "config.yaml").trainer.mixed_precision == choice
    assert f"auto is {choice}: the checkpoint's" in capsys.readouterr().out


def test_bf16_that_is_slow_on_a_cpu_is_said(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, "trainer.mixed_precision=bf16")
    rates(monkeypatch, fp32=100e9, bf16=2e9)
    main, other, gpu = (
        types.SimpleNamespace(device=torch.device(name), is_main=is_main)
        for name, is_main in (("cpu", True), ("cpu", False), ("cuda", True))
    )
    assert precision.bind_precision(config, None, other) == (config, [])  # type: ignore[arg-type]
    assert precision.bind_precision(config, None, gpu) == (config, [])  # type: ignore[arg-type]
    bound, notes = precision.bind_precision(config, None, main)  # type: ignore[arg-type]
    assert bound == config
    assert notes == [
        "trainer.mixed_precision: bf16 is slow here: products of up to 2048 x 32 x 48 make 2.0 GFLOP/s in bf16 and "
        "100.0 in fp32 on this CPU; write trainer.mixed_precision: auto"
    ]
    rates(monkeypatch, fp32=100e9, bf16=60e9)
    assert precision.bind_precision(config, None, main) == (config, [])  # type: ignore[arg-type]


def test_all_processes_take_the_choice_of_the_first(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = tiny(tmp_path, PRECISION), []
    monkeypatch.setattr(precision, "choose_precision", lambda config: asked.append(1) or ("bf16", "it is so"))
    bound = run_ranks(3, lambda runtime: precision.bind_precision(config, None, runtime))
    assert len(asked) == 1
    assert [config.trainer.mixed_precision for config, _ in bound] == ["bf16"] * 3
    assert config.trainer.mixed_precision == "auto", "the config passed is left as it is"


def test_one_gpu_without_bf16_is_enough_for_float32_on_all(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [("bf16", "it has it"), ("no", "it lacks it"), ("bf16", "it has it")]
    monkeypatch.setattr(precision, "choose_device_type", lambda config: "cuda")
    monkeypatch.setattr(precision, "choose_precision", lambda config: answers.pop())
    bound = run_ranks(3, lambda runtime: precision.bind_precision(tiny(tmp_path, PRECISION), None, runtime))
    assert [config.trainer.mixed_precision for config, _ in bound] == ["no"] * 3


@pytest.mark.parametrize(("supported", "choice"), [(True, "bf16"), (False, "no")])
def test_a_gpu_is_asked_and_not_measured(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool, choice: str
) -> None:
    monkeypatch.setattr(device, "measure_product", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert device.choose_precision(tiny(tmp_path, PRECISION, "trainer.use_cpu=false"))[0] == choice


def test_a_gpu_without_bf16_cannot_continue_in_bf16(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    before = tiny(tmp_path, "trainer.mixed_precision=bf16")
    gpu: Any = types.SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(StartupError, match=r"keeps the checkpoint's bf16, .* write trainer.mixed_precision: no"):
        precision.bind_precision(tiny(tmp_path, PRECISION), before, gpu)


# ---- micro-batch ----


def line(model: float, row: float, *, most: int = 10**9) -> Callable[[int], int | None]:
    """A step of `model + row * rows` GiB; out of memory above `most` rows."""
    return lambda rows: None if rows > most else int((model + row * rows) * GIB)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


@pytest.mark.parametrize(
    ("measure", "limit", "chosen", "reason"),
    [
        (line(1, 1), 100, 12, "a peak of 13.00 of 100.00 GiB"),
        (line(1, 1), 7, 6, "a peak of 7.00 of 7.00 GiB; 12 rows need 13.00 GiB"),
        (line(1, 1), 6.9, 4, "a peak of 5.00 of 6.90 GiB; 6 rows need 7.00 GiB"),
        (line(1, 1, most=3), 100, 3, "a peak of 4.00 of 100.00 GiB; 4 rows need more than there is"),
        (line(1, 1, most=0), 100, 0, "none was tried; 1 rows need more than there is"),
        (line(1, 1), 1, 0, "none was tried; 1 rows need 2.00 GiB"),
    ],
)
def test_the_most_rows_by_trial(measure: Callable[[int], int | None], limit: float, chosen: int, reason: str) -> None:
    assert choose_by_trial([1, 2, 3, 4, 6, 12], measure, int(limit * GIB)) == (chosen, reason)


@pytest.mark.parametrize(
    ("measure", "limit", "chosen", "tried"),
    [
        (line(1, 1), 100, 12, [1, 1, 2]),
        (line(1, 1), 12.9, 6, [1, 1, 2]),
        (line(1, 1), 5, 4, [1, 1, 2]),
        (line(1, 1), 3.9, 1, [1]),  # Two rows might need twice as much, and nobody tries what might be too much.
        (line(1, 1), 1.9, 0, [1]),
        (line(1, 0), 3, 12, [1, 1, 2]),
        (line(0, 0, most=0), 3, 0, [1]),
    ],
)
def test_the_most_rows_by_two_measurements(
    measure: Callable[[int], int | None], limit: float, chosen: int, tried: list[int]
) -> None:
    asked: list[int] = []

    def spy(rows: int) -> int | None:
        asked.append(rows)
        return measure(rows)

    assert choose_by_line([1, 2, 3, 4, 6, 12], spy, int(limit * GIB))[0] == chosen
    assert asked == tried
    assert choose_by_line([1], line(1, 1), 3 * GIB) == (1, "1 rows need 2.00 of 3.00 GiB")


def test_what_the_first_step_takes_for_good_does_not_hide_what_a_row_needs() -> None:
    peaks = iter([int(3 * GIB), int(2 * GIB), int(3 * GIB)])  # Of 1, 1 and 2 rows; 2 GiB of the first stay.
    assert choose_by_line([1, 2, 4, 8], lambda rows: next(peaks), int(6.5 * GIB))[0] == 4


def test_the_reason_has_the_numbers() -> None:
    assert choose_by_line([1, 2, 4, 8], line(1, 0.5), 4 * GIB) == (
        4,
        "1 and 2 rows need 1.50 and 2.00 GiB, so 4 need about 3.00 of 4.00 GiB",
    )


@pytest.mark.parametrize(("limit", "rows"), [(100, 12), (5, 4), (2, 1)])
def test_a_run_binds_its_micro_batch_to_the_memory_and_trains_on_the_same_rows(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: int,
    rows: int,
) -> None:
    explicit, chosen, resumed = tmp_path / "explicit", tmp_path / "chosen", tmp_path / "resumed"
    pretrain(
        tiny(
            explicit,
            "trainer.max_steps=8",
            "trainer.global_batch_size=12",
            f"trainer.per_device_train_batch_size={rows}",
        )
    )
    monkeypatch.setattr(micro_batch, "build_measure", lambda *args: line(1, 1))
    monkeypatch.setattr(micro_batch, "cpu_limit", lambda: limit * GIB)
    pretrain(tiny(chosen, *ROWS, "trainer.max_steps=8"))
    assert exact_steps(chosen) == exact_steps(explicit)
    assert load_config(chosen / "config.yaml") == load_config(
        explicit / "config.yaml", [f"trainer.output_dir={chosen}"]
    )
    assert f"trainer.per_device_train_batch_size: auto is {rows}: " in capsys.readouterr().out

    monkeypatch.setattr(micro_batch, "build_measure", fail)
    resume = f"trainer.resume_from_checkpoint={chosen / 'checkpoints/4'}"
    pretrain(tiny(resumed, *ROWS, "trainer.max_steps=8", resume))
    assert exact_steps(resumed) == exact_steps(chosen, after=4)
    assert load_config(resumed / "config.yaml").trainer.per_device_train_batch_size == rows


def test_not_even_one_row(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "cpu_limit", lambda: 0)
    message = r"auto: not even one row of 64 slots fits \(1 rows need .* of 0.00 GiB\); set trainer.gradient_checkpoint"
    with pytest.raises(StartupError, match=message):
        pretrain(tiny(tmp_path, *ROWS))


def test_a_system_that_does_not_tell_its_memory(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> int:
        raise OSError("no /proc")

    monkeypatch.setattr(micro_batch, "cpu_limit", unknown)
    with pytest.raises(StartupError, match=r"auto cannot measure the memory of this system \(no /proc\); write a num"):
        pretrain(tiny(tmp_path, *ROWS))


def test_the_smallest_answer_of_all_processes_holds(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, *ROWS)
    monkeypatch.setattr(micro_batch, "build_measure", lambda config, runtime, *others: line(1, 1 + runtime.rank))
    monkeypatch.setattr(micro_batch, "cpu_limit", lambda: 7 * GIB)

    def bind(runtime: Any) -> Config:
        runtime.device = torch.device("cpu")
        given: dict[str, Any] = dict.fromkeys(("model_config", "attention", "tokenizer"))
        return micro_batch.bind_micro_batch(config, runtime, rows_per_step=12, kept=None, **given)[0]

    # Rank 0 would take 6 of its 6 rows, rank 1 finds 7 GiB for 3.
    assert [c.trainer.per_device_train_batch_size for c in run_ranks(2, bind)] == [3, 3]


def test_the_checkpoint_keeps_its_number_while_rows_length_and_processes_stay(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, *ROWS)
    before = tiny(tmp_path, "trainer.per_device_train_batch_size=3", "trainer.global_batch_size=12")
    saved = {"rows_per_step": 12, "world_size": 2}

    def kept(**changes: Any) -> int | None:
        given: dict[str, Any] = {"checkpoint_config": before, "saved": saved, "rows_per_step": 12, "world": 2}
        return choose_kept(config, **(given | changes))

    assert kept() == 3
    assert kept(world=1) is None
    assert kept(rows_per_step=24) is None
    assert kept(checkpoint_config=None, saved=None) is None
    longer = dataclasses.replace(before, dataset=dataclasses.replace(before.dataset, max_seq_length=32))
    assert kept(checkpoint_config=longer) is None


def test_the_global_batch_must_be_shared_evenly(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, *ROWS)
    assert choose_rows_per_step(config, 3) == 12
    with pytest.raises(StartupError, match="12 cannot be shared evenly by 5 processes; write 15"):
        choose_rows_per_step(config, 5)


def test_a_batch_that_warms_up_is_shared_by_the_chosen_rows(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmup = ("trainer.batch_size_warmup_start=8", "trainer.batch_size_warmup_steps=3", "trainer.max_steps=3")
    with pytest.raises(
        StartupError, match="batch_size_warmup_start: 8 cannot be shared evenly by 3 processes; write 9"
    ):
        choose_rows_per_step(tiny(tmp_path, *ROWS, *warmup), 3)
    monkeypatch.setattr(micro_batch, "build_measure", lambda *args: line(1, 1))
    monkeypatch.setattr(micro_batch, "cpu_limit", lambda: 100 * GIB)
    pretrain(tiny(tmp_path / "run", *ROWS, *warmup))
    assert load_config(tmp_path / "run" / "config.yaml").trainer.per_device_train_batch_size == 4


def test_full_rows_have_no_padding_and_one_document_each(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, *ROWS)
    batch = build_full_rows(config, load_tokenizer(config.tokenizer), 3)
    assert batch.input_ids.shape == (3, 64)
    assert (batch.num_tokens, batch.attended_tokens) == (3 * 64, 3 * 64**2)
    assert batch.num_targets >= 3 * 12, "a fifth of the 62 tokens of each row"


MEASURE = """
import json, sys
import torch
from neobert.config.load import load_config, save_config
from neobert.data.tokenizer import load_tokenizer
from neobert.train.build import build_attention, build_model_config
from neobert.train.hardware.machine import build_runtime
from neobert.train.hardware.micro_batch import build_measure

torch.set_num_threads(1)
config = load_config(sys.argv[1])
tokenizer, runtime = load_tokenizer(config.tokenizer), build_runtime(config)
measure = build_measure(config, runtime, build_model_config(config, tokenizer), build_attention(config), tokenizer)
print(json.dumps([measure(rows) for rows in (8, 8, 16, 24)]))
runtime.close()
"""
"""In a process of its own, as a run has it: the heap of many tests has holes, which a small batch would fill. The first
is measured twice, as a run does: what libraries allocate permanently in the first step is as large as some of its rows.
"""


def test_the_measured_step_is_a_step_of_the_run(tiny: Tiny, tmp_path: Path) -> None:
    """More rows need more memory, about in proportion, and what is measured is bytes."""
    wide = [
        "model.hidden_size=128",
        "model.intermediate_size=512",
        "dataset.max_seq_length=256",
        "model.max_position_embeddings=256",
        "trainer.global_batch_size=64",
    ]
    save_config(tiny(tmp_path, *wide, "trainer.per_device_train_batch_size=auto"), tmp_path / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "config.yaml"], capture_output=True, text=True, check=True
    )
    _, few, more, most = json.loads(done.stdout)
    # The residual stream alone keeps 8 tensors of 128 numbers a token; the whole keeps less than ten times as many.
    per_token = 8 * 128 * 4
    assert 8 * 256 * per_token < more - few < 80 * 256 * per_token
    assert most - more == pytest.approx(more - few, rel=0.5)


def test_a_preview_shows_the_first_step_whatever_the_machine(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "build_measure", fail)
    explicit = ["trainer.per_device_train_batch_size=12", "trainer.global_batch_size=12"]
    assert preview(tiny(tmp_path, *ROWS)) == preview(tiny(tmp_path, *explicit))


# ---- what the system says ----


def make_system(root: Path, available_kib: int, cgroup: str, groups: dict[str, dict[str, str]]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999 kB\nMemAvailable:   {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, files in groups.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(text)
    return root


def limits(limit: str, current: int, inactive: int) -> dict[str, str]:
    return {"memory.max": f"{limit}\n", "memory.current": f"{current}\n", "memory.stat": f"inactive_file {inactive}\n"}


def test_memory_without_control_groups(tmp_path: Path) -> None:
    assert host_memory.available_bytes(make_system(tmp_path, 1000, "0::/\n", {})) == 1_024_000


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"a/b": limits("500000", 200_000, 50_000)}, 350_000),
        ({"a/b": limits("max", 200_000, 0), "a": limits("400000", 300_000, 0)}, 100_000),
        ({"a/b": limits("max", 200_000, 0)}, 1_024_000),
        ({"a/b": limits("9000000", 200_000, 0)}, 1_024_000),
    ],
)
def test_memory_in_control_groups(tmp_path: Path, groups: dict[str, dict[str, str]], expected: int) -> None:
    assert host_memory.available_bytes(make_system(tmp_path, 1000, "0::/a/b\n", groups)) == expected


def test_memory_in_control_groups_of_the_first_version(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": "700000",
        "memory.usage_in_bytes": "300000",
        "memory.stat": "inactive_file 1\ntotal_inactive_file 100000\n",
    }
    cgroup = "5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n"
    assert host_memory.available_bytes(make_system(tmp_path, 1000, cgroup, {"memory/job": files})) == 500_000


def test_memory_of_a_system_that_does_not_tell(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99999 kB\n")
    with pytest.raises(OSError, match="has no MemAvailable"):
        host_memory.available_bytes(tmp_path)


def test_the_memory_of_this_process() -> None:
    host_memory.forget_peak()
    before = host_memory.current_bytes()
    block = torch.ones(2**24)
    del block
    assert host_memory.peak_bytes() - before > 60 * 2**20
    host_memory.forget_peak()
    assert host_memory.peak_bytes() - before < 40 * 2**20
