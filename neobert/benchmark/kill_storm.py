"""Kill a run again and again at random instants, and compare what comes out with the run that was left alone.

A run of 300 steps with dropout, packing, streaming and evaluation is trained once in peace. Then it is started, killed
with SIGKILL after a random time, and resumed with `latest`, until it is finished; this is repeated in fresh folders
until the number of kills is reached. Every step line of every storm must equal the peaceful one's, bit for bit, and so
must the final weights. Of several processes one is killed, any of them, and the others have to end by themselves.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from neobert import cli
from neobert.config.load import load_config, parse_config
from neobert.errors import UserError

SETTINGS = """
seed: 11
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48, dropout_prob: 0.1,
        max_position_embeddings: 64}
dataset: {name: null, max_seq_length: 64, eval_samples: 12, num_lanes: 3, window_documents: 32}
tokenizer: {train: true, vocab_size: 320}
datacollator: {pack_sequences: true}
optimizer: {lr: 1e-2}
scheduler: {warmup_steps: 20}
trainer: {max_steps: 300, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, per_device_eval_batch_size: 4,
          mixed_precision: "no", logging_steps: 5, eval_steps: 50, save_steps: 10, save_total_limit: 3, use_cpu: true}
"""

EXACT = ("step", "loss_hex", "grad_norm_hex", "lr", "num_tokens", "num_targets", "batch_digest")


class Lives:
    """Starting the same run over and over without paying for imports: a parent that has imported everything and forks.

    The parent reads one JSON request a line: the config file, overrides, variables, a file for the output, and a number
    of processes. It forks a child for each rank and answers with their pids; to the request "wait" it answers with how
    they ended (an exit code, or minus a signal). The children are ordinary processes: they can be killed like any
    other. One start at a time.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "neobert.benchmark.kill_storm"]
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


class StormError(UserError):
    """A start that ended by itself; the message names its output."""


@dataclass(kw_only=True, slots=True)
class Storm:
    """One run that was killed until it was finished."""

    kills: int = 0
    killed_while: dict[str, int] = field(default_factory=dict)
    different_steps: int = 0
    same_weights: bool = False
    seconds: float = 0.0
    longest_end: float = 0.0
    """Seconds from a kill to the end of the last process."""

    @property
    def survived(self) -> bool:
        return self.same_weights and self.different_steps == 0


def write_corpus(folder: Path, seed: int) -> None:
    """Three files of made-up sentences."""
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ["ka", "lo", "mi", "re", "su", "ta", "vo"] for b in ["da", "fen", "gol", "hir", "jun"]]
    folder.mkdir(parents=True)
    for number in range(3):
        texts = (" ".join(rng.choices(words, k=rng.randint(3, 120))) for _ in range(200))
        (folder / f"part-{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read_steps(run: Path) -> list[tuple[Any, ...]]:
    """What must repeat, of every step line."""
    lines = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in EXACT) for line in lines if line["kind"] == "step"]


def digest_of_weights(run: Path) -> str:
    """SHA-256 of the newest checkpoint's weights."""
    newest = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    return sha256((run / "checkpoints" / str(newest) / "model.safetensors").read_bytes()).hexdigest()


def find_phase(run: Path) -> str:
    """A guess at what a kill interrupted, from what it left behind."""
    checkpoints = run / "checkpoints"
    if any(checkpoints.glob(".tmp-*")):
        return "saving"
    if any(checkpoints.glob(".trash-*")):
        return "deleting"
    return "training" if (run / "log.jsonl").exists() else "starting"


def run_storm(
    lives: Lives,
    config_file: Path,
    out: Path,
    overrides: Sequence[str],
    *,
    max_kills: int,
    life: float,
    seed: int,
    world: int = 1,
) -> Storm:
    """Starts, kills and resumes a run until it is finished.

    Args:
        max_kills: after this many the run is left alone.
        life: longest life in seconds; each one's is drawn evenly from 0 to this.

    Raises:
        StormError: a start failed.
    """
    rng, storm, started = random.Random(seed), Storm(), time.perf_counter()
    arguments = [*overrides, f"trainer.output_dir={out}", "trainer.resume_from_checkpoint=latest"]
    output = out.with_suffix(".log")
    while True:
        pids = lives.start(config_file, arguments, output, variables=choose_address(), world=world)
        if storm.kills < max_kills:
            time.sleep(rng.uniform(0, life))
            # Not yet waited for, so the number still means this process.
            os.kill(rng.choice(pids), signal.SIGKILL)
        killed = time.perf_counter()
        codes = lives.wait()
        if -signal.SIGKILL in codes:
            storm.kills += 1
            storm.longest_end = max(storm.longest_end, time.perf_counter() - killed)
            doing = find_phase(out)
            storm.killed_while[doing] = storm.killed_while.get(doing, 0) + 1
        elif not any(codes):
            storm.seconds = time.perf_counter() - started
            return storm
        else:
            raise StormError(f"a start ended with codes {codes}; see {output}")


def choose_address() -> dict[str, str]:
    """Where the processes of a start meet: a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def run_storms(folder: Path, more: Sequence[str], *, kills: int, life: float | None, seed: int, world: int = 1) -> int:
    """Prints one line a storm; 1 when one differs from the peaceful run, else 0.

    Args:
        folder: a new or empty one to work in.
        more: further settings of the run.
        life: longest life in seconds; None for half of the peaceful run.
        world: processes of the run.

    Raises:
        ConfigError: in `more`, before anything is written.
        StormError: a start failed.
    """
    overrides = [f"dataset.path={folder / 'corpus'}", *more]
    parse_config(SETTINGS, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus", seed=seed)
    config_file = folder / "storm.yaml"
    config_file.write_text(SETTINGS)

    lives = Lives()
    try:
        return _compare(lives, config_file, overrides, folder, kills=kills, life=life, seed=seed, world=world)
    finally:
        lives.close()


def _compare(
    lives: Lives,
    config_file: Path,
    overrides: list[str],
    folder: Path,
    *,
    kills: int,
    life: float | None,
    seed: int,
    world: int,
) -> int:
    peace = folder / "peace"
    arguments = [*overrides, f"trainer.output_dir={peace}"]
    lives.start(config_file, arguments, folder / "peace.log", variables=choose_address(), world=world)
    started = time.perf_counter()  # The first answer comes when everything is imported.
    if any(lives.wait()):
        raise StormError(f"the run that was left alone failed; see {folder / 'peace.log'}")
    seconds = time.perf_counter() - started
    expected, weights = read_steps(peace), digest_of_weights(peace)
    life = life or seconds / 2
    print(f"left alone: {len(expected)} steps, {seconds:.1f} s, weights sha256 {weights}", flush=True)
    print("storm  kills  steps that differ   weights  seconds  killed while", flush=True)
    storms: list[Storm] = []
    total = 0
    while total < kills:
        out = folder / f"storm-{len(storms)}"
        storm = run_storm(
            lives,
            config_file,
            out,
            overrides,
            max_kills=kills - total,
            life=life,
            seed=seed * 1000 + len(storms),
            world=world,
        )
        found = read_steps(out)
        storm.different_steps = sum(a != b for a, b in zip(expected, found)) + abs(len(expected) - len(found))
        storm.same_weights = digest_of_weights(out) == weights
        total += storm.kills
        storms.append(storm)
        doing = ", ".join(f"{name} {count}" for name, count in sorted(storm.killed_while.items()))
        same = "equal" if storm.same_weights else "DIFFERENT"
        print(
            f"{len(storms) - 1:>5} {storm.kills:>6} {storm.different_steps:>18} {same:>9} {storm.seconds:>8.1f}  "
            f"{doing}",
            flush=True,
        )
        if storm.survived:
            shutil.rmtree(out)
    good = sum(storm.survived for storm in storms)
    print(f"{total} kills in {len(storms)} storms: {good} equal to the one left alone, bit for bit", flush=True)
    if world > 1:
        print(f"the others ended within {max(storm.longest_end for storm in storms):.1f} s of a kill", flush=True)
    return 0 if good == len(storms) else 1


def _serve() -> None:
    import neobert.train.loop  # noqa: F401  Here, so that no child pays for it.

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
    from neobert.train.loop import pretrain

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
