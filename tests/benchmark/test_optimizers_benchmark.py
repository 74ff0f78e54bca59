"""The benchmark of the optimizers, on a small model."""

import torch

from neobert.benchmark.optimizer_cost import (
    describe_orthogonality,
    describe_times,
    make_matrices,
    measure_orthogonality,
    measure_times,
)
from neobert.benchmark.step_time import StepSettings
from neobert.optim.optimizers import OPTIMIZERS


def test_every_optimizer_has_a_time() -> None:
    shape = {"preset": "tiny", "vocab_size": 64, "length": 32, "rows": 2, "mean_document": 12.0}
    settings = StepSettings(**shape, precision="bf16", steps=2, warmup=1)  # type: ignore[arg-type]
    times = measure_times(settings, cpu_time=True)
    variants = ["adamw, cautious decay", "normuon, cautious decay", "normuon, heads split"]
    assert list(times.optimizers) == [*OPTIMIZERS, *variants]
    assert min(times.passes, *times.optimizers.values()) > 0
    table = describe_times(times)
    assert table.startswith("Products in bf16, as asked for.")
    assert all(f"| {name} | " in table for name in times.optimizers)


def test_deviations_are_those_of_the_svd() -> None:
    found = {(f.kind, f.method, f.dtype, f.num_steps): f for f in measure_orthogonality(width=24, count=2)}
    assert len(found) == 3 * 2 * 2 * 5
    good, coarse = (found["wide", "polar_express", "float32", n] for n in (8, 3))
    assert good.worst_value < 0.01
    assert good.distance < 0.01
    assert coarse.worst_value > 10 * good.worst_value
    # Values of newton_schulz never settle: about 0.7 to 1.2.
    assert 0.1 < found["wide", "newton_schulz", "float32", 8].worst_value < 0.4
    assert "| wide | polar_express | float32 | " in describe_orthogonality(list(found.values()))


def test_singular_values_of_the_decaying_matrices() -> None:
    values = torch.linalg.svdvals(make_matrices("decaying", width=4, count=1))[0]
    torch.testing.assert_close(values, torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))
