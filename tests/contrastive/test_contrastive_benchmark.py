"""The benchmark compares ways of computing the same step."""

import pytest
import torch

from neobert.commands.benchmark_commands import parse_pair_benchmark
from neobert.contrastive.pair_benchmark import bind_dtype, measure
from neobert.train.hardware import device


def test_padded_and_cached_steps_are_the_same_steps() -> None:
    words = [
        "--batch-size",
        "4",
        "--cached-batch-size",
        "8",
        "--steps",
        "1",
        "--hidden-size",
        "64",
        "--num-layers",
        "1",
    ]
    args = parse_pair_benchmark("", [*words, "--device", "cpu", "--dtype", "fp32", "--vocab-size", "100"])
    found = {variant: measure(args, variant) for variant in args.variants}
    assert found["padded"].loss == pytest.approx(found["unpadded"].loss, rel=1e-4)
    assert found["cached"].loss == pytest.approx(found["whole"].loss, rel=1e-4)
    assert found["cached"].loss != pytest.approx(found["unpadded"].loss, rel=1e-2)
    assert found["accumulated"].loss != pytest.approx(found["whole"].loss, rel=1e-2)
    assert found["padded"].slots_per_token > 1.5


def test_the_faster_precision_is_chosen_once_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {torch.float32: 1e9, torch.bfloat16: 2e9}
    monkeypatch.setattr(device, "measure_product", lambda rows, inner, outer, dtype: rates[dtype])
    args = parse_pair_benchmark("", ["--device", "cpu", "--hidden-size", "64"])
    assert (args.dtype, bind_dtype(args).dtype) == ("auto", "bf16")
    assert "products in bf16, auto: products of up to 2048 x 64 x 192" in capsys.readouterr().out
