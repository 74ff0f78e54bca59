"""Time and memory of the loss kernels alone: forward and backward of one vocabulary projection with its cross entropy.

Memory is what a call needs beyond its inputs, at the peak: by the allocator on a GPU, by the resident set on a CPU
(Linux), where each measurement has a process of its own. Weights are fp32, products in the dtype asked for.
`reference` is what one writes without a kernel: all logits at once, in fp32 for the cross entropy.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from neobert.benchmark.settings import SHAPES
from neobert.benchmark.step_time import choose_clock
from neobert.kernels.linear_cross_entropy import KERNELS, PACKAGES, kernel_problem
from neobert.train.hardware.device import resolve_precision
from neobert.train.hardware.memory import forget_peak, peak_bytes

_COLUMNS = 4096
"""Of the vocabulary, in the products that choose a precision: few rows of all of it take seconds on some CPUs."""


class Case(NamedTuple):
    """One measurement: rows, hidden size, vocabulary."""

    kernel: str
    rows: int
    hidden: int
    vocabulary: int
    precision: str
    device: str


def measure(case: Case, repeats: int) -> tuple[float, int]:
    """Median seconds of forward and backward, and bytes beyond the inputs at the peak."""
    device = torch.device(case.device)
    torch.manual_seed(0)
    hidden = torch.randn(case.rows, case.hidden, device=device, requires_grad=True)
    weight = (torch.randn(case.vocabulary, case.hidden, device=device) * 0.02).requires_grad_()
    targets = torch.randint(case.vocabulary, (case.rows,), device=device)
    clock = choose_clock(device)
    if device.type == "cpu":
        forget_peak()
    else:
        torch.cuda.reset_peak_memory_stats(device)
    before, seconds = _peak(device), []
    for _ in range(repeats + 1):
        start = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss, *_ = KERNELS[case.kernel](hidden, weight, targets)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - start)
        hidden.grad = weight.grad = None
    return statistics.median(seconds[1:]), _peak(device) - before


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()


def table(kernels: Sequence[str], shapes: Sequence[str], precision: str, device: str, repeats: int) -> str:
    """Every kernel at every shape, each in its own process; `-` where it cannot run or runs out of memory.

    Raises:
        ValueError: a kernel that is none.
    """
    known = list(dict.fromkeys((*KERNELS, *PACKAGES)))
    unknown = [name for name in kernels if name not in known]
    if unknown:
        raise ValueError(f"--kernels: {', '.join(map(repr, unknown))} is unknown; known are {', '.join(known)}")
    reasons, lines = [], ["| M, D, V | kernel | ms | memory |", "|---|---|---|---|"]
    for shape in shapes:
        rows, hidden, vocabulary = SHAPES[shape]
        chosen, reason = resolve_precision(precision, torch.device(device).type, hidden, min(vocabulary, _COLUMNS))
        reasons.append(f"{shape}: products in {chosen}, {reason}.")
        for kernel in kernels:
            case = Case(kernel, rows, hidden, vocabulary, chosen, device)
            lines.append(f"| {shape} | {kernel} | {_in_a_process(case, repeats)} |")
    return "\n".join([*reasons, "", *lines])


def _in_a_process(case: Case, repeats: int) -> str:
    if kernel_problem(case.kernel, torch.device(case.device)) is not None:
        return "- | cannot run here"
    command = [sys.executable, "-m", __name__, json.dumps(case), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"ended with {done.returncode}"
        return f"- | {reason}"
    seconds, size = json.loads(done.stdout)
    return f"{seconds * 1e3:,.1f} | {size / 1e6:,.0f} MB"


if __name__ == "__main__":
    print(json.dumps(measure(Case(*json.loads(sys.argv[1])), int(sys.argv[2]))))
