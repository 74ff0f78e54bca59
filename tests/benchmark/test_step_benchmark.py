"""The step benchmark measures what it says, on rows as training has them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from neobert.benchmark.step import StepSettings, make_batches, measure_step

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark" / "step.py"
TINY = {"preset": "tiny", "vocab_size": 300, "length": 64, "rows": 4, "mean_document": 25.0, "steps": 3, "warmup": 1}


def test_rows_are_nearly_full_and_equal_for_equal_settings() -> None:
    settings = StepSettings(**TINY)  # type: ignore[arg-type]
    batches = make_batches(settings, 4)
    assert len(batches) == 4
    assert all(batch.input_ids.shape == (4, 64) for batch in batches)
    assert sum(b.num_tokens for b in batches) > 0.9 * 4 * 4 * 64
    assert [b.digest for b in batches] == [b.digest for b in make_batches(settings, 4)]
    assert sum(b.num_targets for b in batches) / sum(b.num_tokens - 2 * b.num_documents for b in batches) == (
        pytest.approx(0.2, abs=0.02)
    )


def test_figures_belong_together() -> None:
    figures = measure_step(StepSettings(**TINY, precision="fp32"))  # type: ignore[arg-type]
    assert figures.gemm_fraction * figures.gemm_flops == pytest.approx(
        figures.tokens_per_second * figures.flops_per_token
    )
    assert figures.seconds_p50 <= figures.seconds_p95
    assert figures.mfu is None, "no data sheet is quoted for a CPU"
    assert figures.peak_memory_bytes > 10**7


def test_the_script_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for extra, check in (([], lambda out: "| tokens/s |" in out), (["--json"], json.loads)):
        monkeypatch.setattr(sys, "argv", ["step.py", *flags, *extra])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert ended.value.code == 0
        assert check(capsys.readouterr().out)


def test_a_backend_that_cannot_run_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", "--preset", "tiny", "--attention", "flash_attn_varlen"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert "model.attn_backend" in capsys.readouterr().err
