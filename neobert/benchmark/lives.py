"""Starting the same run over and over without paying for imports, for what kills runs."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from neobert import cli
from neobert.config.load import load_config


class Lives:
    """A parent that has imported everything and forks.

    The parent reads one JSON request a line: the config file, overrides, variables, a file for the output, and a number
    of processes. It forks a child for each rank, or one that is torchrun, and answers with their pids; to the request
    "wait" it answers with how they ended (an exit code, or minus a signal), to "ended" how many have. The children
    are ordinary processes: they can be killed like any other. One start at a time.
    """

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
        launched: bool = False,
    ) -> list[int]:
        """Starts a run; the pids of its ranks, or the one of its launcher. Its output is added to the file `output`."""
        request = {
            "config": str(config_file),
            "overrides": list(overrides),
            "output": str(output),
            "variables": variables or {},
            "world": world,
            "launched": launched,
        }
        return self._ask(request)

    def wait(self) -> list[int]:
        """How they ended: exit codes, or minus the signal. Until then their pids cannot be anybody else's."""
        return self._ask("wait")

    def count_ended(self) -> int:
        """How many of them have, without waiting."""
        return int(self._ask("ended"))

    def close(self) -> None:
        """Ends the parent."""
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def _ask(self, request: Any) -> Any:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


def _serve() -> None:
    import neobert.train.loop  # noqa: F401  Here, so that no child pays for it.

    pids: list[int] = []
    # Not `for line in sys.stdin`: a child inherits what was read ahead.
    while line := sys.stdin.readline():
        request = json.loads(line)
        if request == "wait":
            answer: Any = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        elif request == "ended":
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            answer = sum(os.waitid(os.P_PID, pid, flags) is not None for pid in pids)
        else:
            answer = pids = [_fork(request, rank) for rank in range(1 if request["launched"] else request["world"])]
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any], rank: int) -> int:
    if pid := os.fork():
        return pid
    descriptor = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(request["variables"])
    renew_threads()
    if request["launched"]:
        _launch(request)
    _live(request, rank)


def renew_threads() -> None:
    """To be called in a fork before it has threads: torch makes its thread pool again there, once, and threads that do
    so at the same time see none at all."""
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _launch(request: dict[str, Any]) -> NoReturn:
    from torch.distributed.run import main

    world, port = str(request["world"]), os.environ["MASTER_PORT"]
    command = ["-m", "neobert", "pretrain", request["config"], *(f"--{text}" for text in request["overrides"])]
    code = 1
    try:
        main(["--nproc_per_node", world, "--master_port", port, *command])
        code = 0
    except BaseException:  # torchrun ends with 1 then.
        traceback.print_exc()
    finally:
        os._exit(code)


def _live(request: dict[str, Any], rank: int) -> NoReturn:
    from neobert.train.loop import pretrain

    if request["world"] > 1:
        world = str(request["world"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    cli.run(lambda: cli.EXIT_CODES[pretrain(load_config(request["config"], request["overrides"])).reason])


if __name__ == "__main__":
    _serve()
