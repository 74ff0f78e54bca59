"""Where runs of the tests train: `NEOBERT_TEST_DEVICE`, `cpu` unless it is `cuda`."""

import os

import pytest


def choose_test_device(name: str) -> str:
    """The device of that name. Raises pytest.UsageError for one that is unknown or not here."""
    if name not in ("cpu", "cuda"):
        raise pytest.UsageError(f"NEOBERT_TEST_DEVICE: {name!r} is unknown; write cpu or cuda")
    if name == "cuda" and not find_gpu():
        raise pytest.UsageError("NEOBERT_TEST_DEVICE: cuda, but torch sees no GPU; unset it")
    return name


def find_gpu() -> bool:
    import torch  # Only where a GPU is asked for: the process that hands out the tests imports this module too.

    return torch.cuda.is_available()


DEVICE = choose_test_device(os.environ.get("NEOBERT_TEST_DEVICE", "cpu"))

KEYS = {
    "cpu": ("trainer.use_cpu=true",),
    # Runs are compared bit by bit, which sums on a GPU allow only when they are asked to.
    "cuda": ("trainer.use_cpu=false", "trainer.deterministic=true"),
}
"""Of the config of a run on each device."""

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="what it expects holds on a CPU alone")


def skip_without_fork() -> None:
    """A child that is forked cannot use the GPU that its parent uses."""
    if DEVICE == "cuda":
        pytest.skip("forked children cannot use the GPU of this process")
