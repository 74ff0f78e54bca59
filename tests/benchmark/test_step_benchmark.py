"""The step benchmark measures what it says, on rows as training has them."""

import dataclasses
import itertools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neobert.benchmark import step_time
from neobert.benchmark.step_time import (
    MASKED_ATTENTION,
    StepSettings,
    bind_precision,
    describe,
    made_up_rows,
    measure_gemm,
    measure_step,
)
from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.model.attention import reference_attention
from neobert.train.hardware import device

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
TINY = {"preset": "tiny", "vocab_size": 300, "length": 64, "rows": 4, "mean_document": 25.0, "steps": 3, "warmup": 1}


def test_rows_are_nearly_full_and_equal_for_equal_settings() -> None:
    settings = StepSettings(**{**TINY, "steps": 4})  # type: ignore[arg-type]
    batches = list(itertools.islice(made_up_rows(settings).batches, 4))
    assert all(batch.input_ids.shape == (4, 64) for batch in batches)
    assert sum(b.num_tokens for b in batches) > 0.9 * 4 * 4 * 64
    again = itertools.islice(made_up_rows(settings).batches, 8)
    assert [b.digest for b in again] == 2 * [b.digest for b in batches], "the same batches in turns"
    assert sum(b.num_targets for b in batches) / sum(b.num_tokens - 2 * b.num_documents for b in batches) == (
        pytest.approx(0.2, abs=0.02)
    )


def test_padded_rows_hold_one_document() -> None:
    settings = StepSettings(**TINY, padded=True)  # type: ignore[arg-type]
    batch = next(made_up_rows(settings).batches)
    assert (batch.input_ids.shape, batch.num_documents) == ((4, 64), 4)


def test_numbers_belong_together() -> None:
    timing = measure_step(StepSettings(**TINY, precision="fp32"))  # type: ignore[arg-type]
    assert timing.gemm_fraction * timing.gemm_flops == pytest.approx(timing.tokens_per_second * timing.flops_per_token)
    assert timing.seconds_p50 <= timing.seconds_p95
    assert timing.mfu is None, "no data sheet is quoted for a CPU"
    assert timing.peak_memory_bytes > 10**7


def test_the_script_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for extra, check in (([], lambda out: "| tokens/s |" in out), (["--json"], json.loads)):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, *extra])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert ended.value.code == 0
        assert check(capsys.readouterr().out)


def test_a_backend_that_cannot_run_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--preset", "tiny", "--attention", "flash_attn_varlen"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert "model.attn_backend" in capsys.readouterr().err


def run_script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_rows_of_a_config_come_through_the_loader(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(tiny(tmp_path / "run")))
    flags = ("--config", str(file), "dataset.max_seq_length=32", "--steps", "3", "--warmup", "1", "--json")
    assert run_script(monkeypatch, *flags) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rows"] == f"4 rows of 32 of {file}"
    assert 0 <= values["data_wait"] < 1
    assert run_script(monkeypatch, "--config", str(file), "--rows", "3") == 2
    assert "--config: it decides --rows too" in capsys.readouterr().err
    assert run_script(monkeypatch, "dataset.max_seq_length=32") == 2
    assert "an override needs --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["all_positions", "plain_adamw", "gradient_checkpointing"])
def test_every_switch_of_the_comparison_runs(switch: str) -> None:
    timing = measure_step(StepSettings(**{**TINY, switch: True, "steps": 1, "precision": "bf16"}))  # type: ignore[arg-type]
    assert timing.tokens_per_second > 0
    assert (timing.precision, timing.precision_reason) == ("bf16", "as asked for")


@pytest.mark.parametrize(("bf16", "chosen"), [(50e9, "fp32"), (400e9, "bf16")])
def test_auto_is_the_precision_that_is_faster_and_is_said(
    monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: str
) -> None:
    measured = {torch.float32: 100e9, torch.bfloat16: bf16}
    monkeypatch.setattr(device, "measure_product", lambda rows, inner, outer, dtype: measured[dtype])
    settings = StepSettings(**{**TINY, "steps": 1})  # type: ignore[arg-type]
    dtypes = []

    def note(settings: StepSettings, model: object, device: torch.device, dtype: torch.dtype, *more: object) -> object:
        dtypes.append((settings.precision, dtype))
        return build(settings, model, device, dtype, *more)  # type: ignore[arg-type]

    build = step_time.build_model
    monkeypatch.setattr(step_time, "build_model", note)
    table = describe(settings, measure_step(settings))
    assert dtypes == [(chosen, {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen])]
    assert f"| precision | {chosen}, auto: products of up to 2048 x 32 x 48 make {bf16 / 1e9:.1f} GFLOP/s" in table


@pytest.mark.parametrize("form", [{"bf16_residual": True}, {"fp8": "emulated"}])
def test_auto_is_bf16_for_its_forms(monkeypatch: pytest.MonkeyPatch, form: dict[str, bool | str]) -> None:
    monkeypatch.setattr(device, "measure_product", lambda *_: pytest.fail("there is no choice"))
    settings = StepSettings(**{**TINY, **form})  # type: ignore[arg-type]
    bound, reason = bind_precision(settings, made_up_rows(settings).model)
    assert bound == dataclasses.replace(settings, precision="bf16")
    assert "--bf16-residual" in reason


def test_a_rate_is_measured_with_fewer_rows_where_a_product_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 16 rows in 0.02 s pays for 80 of 1,024."""
    monkeypatch.setattr(device, "_time_product", lambda a, b: len(a) / 800)
    ticks = itertools.count()
    assert measure_gemm(torch.device("cpu"), torch.float32, lambda: float(next(ticks)), 2) == (
        2 * 80 * 1024**2,
        "80 x 1,024 x 1,024",
    )


def test_masked_attention_is_the_same_attention() -> None:
    batch = next(made_up_rows(StepSettings(**TINY)).batches)  # type: ignore[arg-type]
    q, k, v = torch.randn(3, 4 * 64, 2, 16).unbind()
    got = MASKED_ATTENTION.attend(q, k, v, MASKED_ATTENTION.prepare(batch.segments), scale=0.25)
    real = batch.segments.ids.flatten() > 0
    torch.testing.assert_close(got[real], reference_attention(q, k, v, batch.segments, scale=0.25)[real])
