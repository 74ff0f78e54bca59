"""Schedules of learning rate, batch and masks in whole runs: exact to resume, to branch, to extend and to replay."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from children import run_in_two
from records import exact_steps, log_lines
from safetensors.torch import load_file
from test_processes import check_equal

from neobert.cli import EXIT_CODES
from neobert.commands.replay import replay_row
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train.build import choose_rows_per_step
from neobert.train.loop import pretrain
from neobert.train.run import build_run

Tiny = Callable[..., Config]

BATCH = ["trainer.global_batch_size=12", "trainer.batch_size_warmup_start=4", "trainer.batch_size_warmup_steps=5"]
SIZES = [4, 4, 4, 8, 8, 12, 12, 12, 12]
"""Rows of each step: 4 + 4 * floor(step * 2 / 5)."""

MASKS = ["datacollator.mlm_probability=0.4", "datacollator.mlm_probability_final=0.1", "datacollator.mask_units=spans"]
RATES = ["scheduler.name=wsd", "scheduler.cooldown_steps=4", "scheduler.final_lr_ratio=0"]
EVERYTHING = [*BATCH, *MASKS, *RATES, "trainer.max_steps=9", "trainer.eval_steps=3"]


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with every schedule on, saved at every step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(tiny(out, *EVERYTHING, "model.dropout_prob=0.1", "trainer.save_steps=1"))
    return out


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_run_cut_anywhere_equals_the_uninterrupted_one(tiny: Tiny, tmp_path: Path, whole: Path, cut: int) -> None:
    out = tmp_path / "run"
    resume = f"trainer.resume_from_checkpoint={whole}/checkpoints/{cut}"
    pretrain(tiny(out, *EVERYTHING, "model.dropout_prob=0.1", "trainer.save_steps=0", resume))
    assert exact_steps(out) == exact_steps(whole, after=cut)
    ends = [load_file(folder / "checkpoints/9/model.safetensors") for folder in (whole, out)]
    assert all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0])
    shutil.rmtree(out)


def test_every_step_has_its_rows_its_rate_and_its_fraction_of_masks(tiny: Tiny, whole: Path) -> None:
    steps = log_lines(whole, "step")
    fill = steps[-1]["num_tokens"] / (12 * 64)
    assert [x["num_tokens"] / 64 for x in steps] == pytest.approx([size * fill for size in SIZES], rel=0.15)
    fractions = [x["num_targets"] / x["num_tokens"] for x in steps]
    # Special tokens are 2 of about 40 in these documents; they count as tokens and are never predicted.
    assert fractions == pytest.approx([(0.4 - 0.3 * step / 9) * 0.95 for step in range(9)], rel=0.06)
    shape = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]
    assert [x["lr"] / 1e-2 for x in steps] == pytest.approx(shape)


def test_shapes_and_evaluation_do_not_change_with_the_step(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    run = build_run(tiny(tmp_path / "run", *EVERYTHING))
    loader = run.data.loader()
    batches = [next(loader) for _ in range(9)]
    loader.close()
    assert [len(step.micro_batches) for step in batches] == [size // 4 for size in SIZES]
    shapes = {
        (m.input_ids.shape, m.targets.shape, m.segments.cu_seqlens.shape) for s in batches for m in s.micro_batches
    }
    assert len(shapes) == 1
    assert {m.targets.shape for s in batches for m in s.micro_batches} == {(4 * 27,)}, "ceil(0.4 * 64) + 1 a row"
    plain = tmp_path / "plain"
    pretrain(tiny(plain, "model.dropout_prob=0.1", "trainer.max_steps=1"))
    first, other = log_lines(whole, "eval")[0], log_lines(plain, "eval")[0]
    assert {name: first[name] for name in ("step", "loss", "num_targets")} == {
        name: other[name] for name in ("step", "loss", "num_targets")
    }


def test_two_processes_equal_one(tiny: Tiny, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(tiny(one, *EVERYTHING))
    resume = f"trainer.resume_from_checkpoint={one}/checkpoints/4"
    config = tiny(two, *EVERYTHING, "trainer.per_device_train_batch_size=2", resume)
    run_in_two(lambda: EXIT_CODES[pretrain(config).reason], tmp_path)
    check_equal(one, two, after=4)


TRUNK = ["scheduler.name=constant", "trainer.max_steps=8", "model.dropout_prob=0.1"]


def test_decays_branch_off_a_stable_trunk(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk, long, short = tmp_path / "trunk", tmp_path / "long", tmp_path / "short"
    pretrain(tiny(trunk, *TRUNK))
    resume = f"trainer.resume_from_checkpoint={trunk}/checkpoints/4"
    branch = [*TRUNK, resume, "scheduler.name=wsd"]
    pretrain(tiny(long, *branch, "scheduler.cooldown_steps=3", "trainer.max_steps=10"))
    printed = capsys.readouterr().out
    pretrain(tiny(short, *branch, "scheduler.cooldown_steps=2", "trainer.max_steps=7", "scheduler.final_lr_ratio=0"))
    late = tmp_path / "late"
    pretrain(
        tiny(late, *branch, "scheduler.cooldown_steps=4", "trainer.max_steps=6", "scheduler.cooldown_shape=linear")
    )
    jump = "learning rate of step 5: 1.000e-02 by the checkpoint's schedule, 5.500e-03 by this one"
    assert jump in capsys.readouterr().out, "two of the four steps of the cool-down are over"
    base = exact_steps(trunk, after=4)
    assert exact_steps(long)[:3] == base[:3], "until step 7 of 10, where its cool-down starts"
    assert exact_steps(short)[:1] == base[:1], "until step 5 of 7"
    rows = [[x["batch_digest"] for x in log_lines(out, "step")] for out in (trunk, long, short)]
    assert rows[0][4:] == rows[1][:4]
    assert rows[1][:3] == rows[2]
    assert [x["lr"] for x in log_lines(long, "step")][:4] == [1e-2] * 4
    assert log_lines(long, "step")[5]["lr"] < log_lines(long, "step")[4]["lr"] < 1e-2
    assert "scheduler.name" in printed
    assert "free" in printed
    assert "learning rate of step" not in printed, "it continues as it was"
    assert exact_steps(trunk, after=4) == base, "the trunk is left alone"


def test_an_extended_run_continues_at_the_fractions_of_its_new_length(tiny: Tiny, tmp_path: Path) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    falling = ["datacollator.mlm_probability=0.4", "datacollator.mlm_probability_final=0.1"]
    pretrain(tiny(out, *falling, "trainer.max_steps=4"))
    pretrain(tiny(again, *falling, "trainer.max_steps=12"))
    pretrain(tiny(out, *falling, "trainer.max_steps=12", "trainer.resume_from_checkpoint=latest"))
    extended, planned = log_lines(out, "step"), log_lines(again, "step")
    assert [x["num_targets"] for x in extended[4:]] == [x["num_targets"] for x in planned[4:]]
    assert extended[3]["num_targets"] < 0.6 * planned[3]["num_targets"]
    # With an end of its own, the curve does not depend on the length of the run, and the next batch is compared.
    pinned, longer = tmp_path / "pinned", tmp_path / "longer"
    falling.append("datacollator.mlm_probability_final_step=6")
    pretrain(tiny(pinned, *falling, "trainer.max_steps=4"))
    pretrain(tiny(longer, *falling))
    pretrain(tiny(pinned, *falling, "trainer.resume_from_checkpoint=latest"))
    assert [x["batch_digest"] for x in log_lines(pinned, "step")] == [
        x["batch_digest"] for x in log_lines(longer, "step")
    ]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("datacollator.mask_units=words", "datacollator.mask_units"),
        ("datacollator.mlm_probability_final=0.2", "datacollator.mlm_probability_final"),
        ("datacollator.mask_fraction=0.7", "datacollator.mask_fraction"),
        ("trainer.batch_size_warmup_steps=6", "trainer.batch_size_warmup_steps"),
    ],
)
def test_other_masks_and_batches_are_declared(
    tiny: Tiny, tmp_path: Path, whole: Path, change: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model.dropout_prob=0.1", *EVERYTHING, change, f"trainer.resume_from_checkpoint={whole}/checkpoints/4"]
    with pytest.raises(StartupError, match=rf"{key} +needs declaring"):
        pretrain(tiny(tmp_path / "run", *settings))
    pretrain(tiny(tmp_path / "run", *settings, f"trainer.resume_allow=[{key}]"))
    assert [x["step"] for x in log_lines(tmp_path / "run", "step")] == [5, 6, 7, 8, 9]


def test_budgets_count_the_smaller_first_steps(tiny: Tiny, tmp_path: Path) -> None:
    # 4 + 4 + 4 + 8 + 8 rows before step 5, then 12 a step: 33 rows are 6 steps, 41 rows are 7.
    for rows, steps in ((33, 6), (40, 6), (41, 7)):
        run = build_run(tiny(tmp_path / str(rows), *BATCH, "trainer.max_steps=null", f"trainer.max_tokens={rows * 64}"))
        assert run.num_steps == steps
    epoch = tiny(
        tmp_path / "epochs",
        *BATCH,
        "trainer.max_steps=null",
        "trainer.num_train_epochs=1.5",
        "dataset.streaming=false",
    )
    run = build_run(epoch)
    assert run.data.num_tokens is not None
    rows = run.data.batch.rows_before(run.num_steps)
    assert rows - 12 < 1.5 * run.data.num_tokens / 64 <= rows


def test_a_replayed_row_is_masked_as_in_its_step(tiny: Tiny, whole: Path) -> None:
    digests = [x["batch_digest"] for x in log_lines(whole, "step")]
    row = 0
    for step, size in list(enumerate(SIZES, start=1))[:5]:
        replayed = [replay_row(whole, number) for number in range(row, row + size)]
        assert {x.step for x in replayed} == {step}
        assert f"{sum(x.batch.digest for x in replayed) % 2**64:016x}" == digests[step - 1]
        row += size


def test_a_first_batch_that_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    steps = "trainer.batch_size_warmup_steps=5"
    config = tiny(tmp_path, "trainer.global_batch_size=24", "trainer.batch_size_warmup_start=12", steps)
    assert choose_rows_per_step(config, world=3) == 24
    with pytest.raises(StartupError, match=r"warmup_start: 12 is no multiple of .* = 4 x 2; the next one that is: 16"):
        choose_rows_per_step(config, world=2)
    small = tiny(tmp_path, "trainer.gradient_accumulation_steps=3", "trainer.batch_size_warmup_start=12", steps)
    with pytest.raises(StartupError, match="12 rows are no fewer than the 12 rows of the full batch"):
        choose_rows_per_step(small, world=1)


def test_the_console_reports_the_warm_up_of_the_batch(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny(tmp_path / "run", *BATCH, "trainer.max_steps=6"))
    printed = capsys.readouterr().out
    assert "warm-up   of the batch from 4 rows to 12 at step 5, 4 at a time" in printed
    assert f"6 steps, {40 * 64:,} row slots" in printed
