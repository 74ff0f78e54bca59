"""Memory that a step frees is there for the next one: no fresh pages from the kernel."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from neobert.train.allocator import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
def step():
    return torch.ones(48 * 2**20, dtype=torch.uint8).sum()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an allocator of glibc")
def test_large_blocks_are_kept() -> None:
    def page_faults(*arguments: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pages = 4 * 48 * 2**20 // resource.getpagesize()
    assert page_faults() > pages / 2, "the program must show what is cured"
    assert page_faults("keep") < pages / 20
