"""The benchmark compares ways of computing the same step."""

import pytest

from neobert.commands.benchmark_commands import parse_pair_benchmark
from neobert.contrastive.pair_benchmark import measure


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
    args = parse_pair_benchmark("", [*words, "--device", "cpu", "--vocab-size", "100"])
    found = {variant: measure(args, variant) for variant in args.variants}
    assert found["padded"].loss == pytest.approx(found["unpadded"].loss, rel=1e-4)
    assert found["cached"].loss == pytest.approx(found["whole"].loss, rel=1e-4)
    assert found["cached"].loss != pytest.approx(found["unpadded"].loss, rel=1e-2)
    assert found["accumulated"].loss != pytest.approx(found["whole"].loss, rel=1e-2)
    assert found["padded"].slots_per_token > 1.5
