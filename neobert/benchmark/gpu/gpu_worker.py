"""The process in which a check of `gpu_check` runs: reads names on its standard input, answers in lines of JSON.

What a check prints goes to the standard error, which is the log.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch

if not torch.cuda.is_available():  # Before triton is imported: its kernels run in the interpreter then.
    os.environ["TRITON_INTERPRET"] = "1"

from neobert import cli
from neobert.benchmark.gpu.gpu_table import CHECKS, Bench, CannotRun, Found, NotAsExpected


def answer(name: str, device: str) -> dict[str, Any]:
    """The result of a check."""
    cli.say("", f"=== {name}")
    module, function = CHECKS[name].function.split(":")
    torch.compiler.reset()
    try:
        with tempfile.TemporaryDirectory() as folder:
            check = getattr(importlib.import_module(f"neobert.benchmark.gpu.{module}"), function)
            found: Found = check(Bench(device=device, folder=Path(folder)))
    except CannotRun as error:
        return {"state": "skipped", "reason": str(error)}
    except Exception as error:  # Of a kernel, of the compiler, of a run: any kind is a result.
        traceback.print_exc()
        text = " ".join(str(error).split())
        seen = error.found if isinstance(error, NotAsExpected) else Found()
        reason = f"{type(error).__name__}: {text[:400]}"
        return {"state": "failed", "reason": reason, "lines": seen.lines, "values": seen.values}
    return {"state": "done", "lines": found.lines, "values": found.values}


def serve(channel: TextIO) -> None:
    """Answers until the standard input ends. A process that waits leaves the GPU alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for line in sys.stdin:
        name = json.loads(line)["name"]
        found = describe_machine() if name is None else answer(name, device)
        print(json.dumps(found), file=channel, flush=True)


def describe_machine() -> dict[str, Any]:
    """What `Machine` of `gpu_check` holds."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"device": torch.cuda.get_device_name(0) if gpus else "cpu", "gpus": gpus}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(answers)
