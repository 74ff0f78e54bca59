"""What rounding to fp8 (`trainer.fp8`) does to products and to a loss: `python -m neobert.benchmark.fp8_error`.

The emulation of `neobert.model.fp8` computes on any machine what a GPU would. First a layer of NeoBERT's size: inputs
are Gaussian with a few channels that are ten times as large, as those of trained encoders are, gradients Gaussian with
a size of their own for each token. Errors are norms of the difference to fp32, as parts of the norm of the fp32 result,
for bf16, and for fp8 with d y in e4m3 and in e5m2. Then runs of a tiny model on Python's standard library in each
precision, seed by seed.
"""

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from neobert.benchmark.gpu.gpu_runs import build_config, read_log
from neobert.benchmark.gpu.gpu_table import Bench
from neobert.model.fp8 import emulate, fp8_linear
from neobert.train.loop import pretrain

PRODUCTS = ("y", "d x", "d W")
LAYERS = {"qkv": (768, 2304), "gate_up": (768, 4096), "down": (2048, 768)}
SEEDS = range(5)
KEYS = {
    "fp32": ["trainer.mixed_precision=no"],
    "bf16": ["trainer.mixed_precision=bf16"],
    "bf16_residual": ["trainer.mixed_precision=bf16", "trainer.bf16_residual=true"],
    "fp8": ["trainer.mixed_precision=bf16", "trainer.fp8=emulated"],
    "fp8, bf16_residual": ["trainer.mixed_precision=bf16", "trainer.fp8=emulated", "trainer.bf16_residual=true"],
}


_RUN = (
    "model.hidden_size=64",
    "trainer.per_device_train_batch_size=8",
    "optimizer.lr=5e-3",
    "trainer.save_model=false",
)


def measure_products(inputs: int, outputs: int, *, tokens: int = 512, seed: int = 0) -> dict[str, list[float]]:
    """Relative errors of y, d x and d W by precision."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    x[:, :: inputs // 8] *= 10
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    grad = torch.randn(tokens, outputs, generator=generator) * torch.randn(tokens, 1, generator=generator).exp()
    want = _product_and_gradients(x @ weight.T, x, weight, grad)
    found = {}
    low = (x.bfloat16(), weight.bfloat16(), grad.bfloat16())
    found["bf16"] = _product_and_gradients(low[0] @ low[1].T, *low)
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("fp8, d y in e5m2", torch.float8_e5m2)):
        own, weights = low[0].requires_grad_(), low[1].requires_grad_()
        y = fp8_linear(own, weights, emulate, dtype)
        found[name] = [y.detach(), *torch.autograd.grad(y, (own, weights), low[2])]
    return {
        name: [((a.float() - b).norm() / b.norm()).item() for a, b in zip(results, want)]
        for name, results in found.items()
    }


def _product_and_gradients(y: Tensor, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    return [y, grad @ weight, grad.T @ x]


def measure_losses(folder: Path, *, steps: int = 50, seeds: Iterable[int] = range(3)) -> dict[str, list[list[float]]]:
    """The losses of runs, by precision and seed; the text is the same for all."""
    found: dict[str, list[list[float]]] = {name: [] for name in KEYS}
    for seed in seeds:
        for number, (name, keys) in enumerate(KEYS.items()):
            run = f"{seed}-{number}"
            bench = Bench(device="cpu", folder=folder)
            more = [f"seed={seed}", f"trainer.max_steps={steps}", *_RUN, *keys]
            with contextlib.redirect_stdout(sys.stderr):
                pretrain(build_config(bench, run, *more))
            found[name].append([line["loss"] for line in read_log(folder / run)])
    return found


def main() -> None:
    """Prints both tables."""
    print("| layer | precision | y | d x | d W |\n|---|---|---|---|---|")
    for layer, sizes in LAYERS.items():
        measured = [measure_products(*sizes, seed=seed) for seed in SEEDS]
        for name in measured[0]:
            columns = zip(*(errors[name] for errors in measured))
            cells = " | ".join(f"{statistics.mean(c):.2%} ± {statistics.stdev(c):.2%}" for c in columns)
            print(f"| {layer} | {name} | {cells} |")
    with tempfile.TemporaryDirectory() as folder:
        losses = measure_losses(Path(folder))
    print("\n| precision | last loss, by seed | mean difference to fp32, of all steps | largest |\n|---|---|---|---|")
    for name, runs in losses.items():
        pairs = [abs(a - b) / b for run, right in zip(runs, losses["fp32"]) for a, b in zip(run, right)]
        last = ", ".join(f"{statistics.mean(run[-5:]):.4f}" for run in runs)
        print(f"| {name} | {last} | {statistics.mean(pairs):.3%} | {max(pairs):.3%} |")


if __name__ == "__main__":
    main()
