"""Memory that a step frees is there for the next one: no fresh pages from the kernel."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from neobert.train.allocator import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
for step in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(megabytes * 2**18) for megabytes in (48, 8, 31, 2, 16)]
    held.pop(1)
    held.append(torch.ones(40 * 2**18))
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an allocator of glibc")
def test_later_steps_meet_no_fresh_pages() -> None:
    def page_faults(*arguments: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert page_faults() > 5000, "the program must show what is cured"
    assert page_faults("keep") < 500
