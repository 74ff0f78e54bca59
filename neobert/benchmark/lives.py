"""Starting the same run over and over without paying for imports: a parent that has imported everything and forks.

`python -m neobert.benchmark.lives` reads one JSON request a line: the config file, overrides, variables, a file for the
output, and a number of processes. It forks a child for each rank and answers with their pids; to the request "wait" it
answers with how they ended (an exit code, or minus a signal). The children are ordinary processes: they can be killed
like any other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from neobert import cli
from neobert.config.load import load_config
from neobert.train.loop import pretrain


class Lives:
    """The parent, as its user sees it. One start at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "neobert.benchmark.lives"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def start(
        self,
        config_file: Path,
        overrides: Sequence[str],
        output: Path,
        *,
        variables: dict[str, str] | None = None,
        world: int = 1,
    ) -> list[int]:
        """Starts a run; the pids of its ranks. Its output is added to the file `output`."""
        request = {
            "config": str(config_file),
            "overrides": list(overrides),
            "output": str(output),
            "variables": variables or {},
            "world": world,
        }
        self._ask(request)
        return self._answer()

    def wait(self) -> list[int]:
        """How the ranks ended: exit codes, or minus the signal. Until then their pids cannot be anybody else's."""
        self._ask("wait")
        return self._answer()

    def close(self) -> None:
        """Ends the parent."""
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def _ask(self, request: Any) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()

    def _answer(self) -> list[int]:
        assert self._parent.stdout is not None
        return json.loads(self._parent.stdout.readline())


def _serve() -> None:
    pids: list[int] = []
    # Not `for line in sys.stdin`: a child inherits what was read ahead.
    while line := sys.stdin.readline():
        request = json.loads(line)
        if request == "wait":
            print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
            continue
        pids = []
        for rank in range(request["world"]):
            pid = os.fork()
            if pid == 0:
                _live(request, rank)
            pids.append(pid)
        print(json.dumps(pids), flush=True)


def _live(request: dict[str, Any], rank: int) -> NoReturn:
    descriptor = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(request["variables"])
    if request["world"] > 1:
        world = str(request["world"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    cli.run(lambda: cli.EXIT_CODES[pretrain(load_config(request["config"], request["overrides"])).reason])


if __name__ == "__main__":
    _serve()
