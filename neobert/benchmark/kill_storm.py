"""Kill a run again and again at random instants, and compare what comes out with the run that was left alone.

A run of 300 steps with dropout, packing, streaming and evaluation is trained once in peace. Then it is started, killed
with SIGKILL after a random time, and resumed with `latest`, until it is finished; this is repeated in fresh folders
until the number of kills is reached. Every step line of every storm must equal the peaceful one's, bit for bit, and so
must the final weights, and after every kill each checkpoint that is there must be whole. Of several processes one is
killed, any of them, and the others have to end by themselves; with a launcher, half of the kills are of torchrun, by
SIGKILL or SIGTERM.
"""

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from neobert.benchmark.lives import Lives
from neobert.config.load import parse_config
from neobert.errors import UserError
from neobert.weights.folder import check_contents, checkpoint_steps

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
          mixed_precision: "no", logging_steps: 5, eval_steps: 50, save_steps: 10, save_total_limit: 3, use_cpu: true,
          rank_timeout_seconds: 60}
"""

MOST_SECONDS = 120
"""From a kill to the end of the last process: the timeout of the run, and what a busy machine needs beside it."""

IN_SAVE_SECONDS = 0.02
"""A kill in a save comes at most so long after it has begun."""

EXACT = ("step", "loss_hex", "grad_norm_hex", "lr", "num_tokens", "num_targets", "batch_digest")


class StormError(UserError):
    """A start that ended by itself, or a process that did not end; the message names the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """What is killed, how, and when."""

    of_launcher: bool
    signal: int
    after: Literal["start", "step", "save"]
    """A random time after the start, after the first step line, or after a save has begun."""


def draw_kill(rng: random.Random, *, launcher: bool, into_saves: float) -> Kill:
    """Half of the kills are of the launcher, where there is one, and half of these are requests.

    Args:
        into_saves: chance that a kill waits for a save.
    """
    of_launcher = launcher and rng.random() < 0.5
    after: Literal["start", "step", "save"] = "start"
    if rng.random() < into_saves:
        after = "save"
    elif of_launcher and rng.random() < 0.75:  # Its processes take long to start.
        after = "step"
    killer = rng.choice([signal.SIGKILL, signal.SIGTERM]) if of_launcher else signal.SIGKILL
    return Kill(of_launcher=of_launcher, signal=killer, after=after)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is in a run's folder."""

    unfinished: frozenset[str]
    """Folders of saves and deletions that were cut off, or are under way."""

    logged: int
    """Bytes of `log.jsonl`."""


def look(run: Path) -> Seen:
    """What is there now."""
    names = [path.name for path in (run / "checkpoints").glob(".t*-*")]
    log = run / "log.jsonl"
    return Seen(unfinished=frozenset(names), logged=log.stat().st_size if log.exists() else 0)


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

    def count(self, kill: Kill, doing: str, *, seconds: float) -> None:
        """Adds a kill, after which the last process ended in `seconds`."""
        self.kills += 1
        victim = f" ({signal.Signals(kill.signal).name} to torchrun)" if kill.of_launcher else ""
        self.killed_while[doing + victim] = self.killed_while.get(doing + victim, 0) + 1
        self.longest_end = max(self.longest_end, seconds)

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


def find_phase(run: Path, before: Seen) -> str:
    """A guess at what a kill interrupts, from what is there and was not there when the run was started."""
    now = look(run)
    names = now.unfinished - before.unfinished
    for prefix, doing in ((".tmp-", "saving"), (".trash-", "deleting")):
        if any(name.startswith(prefix) for name in names):
            return doing
    return "training" if now.logged != before.logged else "starting"


def wait_for_moment(lives: Lives, run: Path, before: Seen, kill: Kill, seconds: float) -> None:
    """Until the run does what the kill waits for, or has ended, and `seconds` more; no longer than it takes to end."""
    if kill.after != "start":
        phases = ("saving",) if kill.after == "save" else ("training", "saving", "deleting")
        rounds = 0
        while find_phase(run, before) not in phases:
            time.sleep(0.002)
            rounds += 1
            if rounds % 50 == 0 and lives.count_ended():
                return
    time.sleep(seconds)


def wait_for_end(lives: Lives, run: Path, num_started: int, output: Path) -> list[int]:
    """How the processes of a run ended after a kill, when those that torchrun started have ended too.

    Raises:
        StormError: one of them still runs after `MOST_SECONDS`.
    """
    deadline = time.monotonic() + MOST_SECONDS
    while lives.count_ended() < num_started or find_processes(run):
        if time.monotonic() > deadline:
            raise StormError(f"a process still runs {MOST_SECONDS} s after a kill; see {output}")
        time.sleep(0.05)
    return lives.wait()


def find_processes(run: Path) -> list[int]:
    """Pids of processes with the folder of a run among their arguments; those that have ended have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:  # It ended meanwhile.
            continue
        if f"--trainer.output_dir={run}".encode() in text.split(b"\0"):
            found.append(int(path.parent.name))
    return found


def run_storm(
    lives: Lives,
    config_file: Path,
    out: Path,
    *,
    overrides: Sequence[str],
    max_kills: int,
    life: float,
    seed: int,
    world: int = 1,
    launcher: bool = False,
    into_saves: float = 0.0,
) -> Storm:
    """Starts, kills and resumes a run until it is finished.

    Args:
        max_kills: after this many the run is left alone.
        life: longest life in seconds; each one's is drawn evenly from 0 to this.
        launcher: half of the starts are by torchrun, which is what is killed then.
        into_saves: chance that a kill waits for a save.

    Raises:
        StormError: a start failed, or a process did not end.
        CheckpointError: a kill left a damaged checkpoint.
    """
    rng, storm, started = random.Random(seed), Storm(), time.perf_counter()
    arguments = [*overrides, f"trainer.output_dir={out}", "trainer.resume_from_checkpoint=latest"]
    output = out.with_suffix(".log")
    while True:
        kill, before = draw_kill(rng, launcher=launcher, into_saves=into_saves), look(out)
        where, doing = choose_address(), ""
        pids = lives.start(config_file, arguments, output, variables=where, world=world, launched=kill.of_launcher)
        if storm.kills < max_kills:
            longest = IN_SAVE_SECONDS if kill.after == "save" else life
            wait_for_moment(lives, out, before, kill, rng.uniform(0, longest))
            # Not yet waited for, so the number still means this process.
            os.kill(rng.choice(pids), kill.signal)
            doing = find_phase(out, before)
        killed = time.perf_counter()
        codes = wait_for_end(lives, out, len(pids), output) if doing else lives.wait()
        if -signal.SIGKILL in codes or (doing and kill.of_launcher and any(codes)):
            storm.count(kill, doing, seconds=time.perf_counter() - killed)
            for step in checkpoint_steps(out):
                check_contents(out / "checkpoints" / str(step))
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


def run_storms(
    folder: Path,
    more: Sequence[str],
    *,
    kills: int,
    life: float | None,
    seed: int,
    world: int = 1,
    launcher: bool = False,
    into_saves: float = 0.0,
) -> int:
    """Prints one line a storm; 1 when one differs from the peaceful run, else 0.

    Args:
        folder: a new or empty one to work in.
        more: further settings of the run.
        life: longest life in seconds; None for half of the peaceful run.
        world: processes of the run.
        launcher: see `run_storm`, as for `into_saves`.

    Raises:
        ConfigError: in `more`, before anything is written.
        StormError: a start failed, or a process did not end.
        CheckpointError: a kill left a damaged checkpoint.
    """
    overrides = [f"dataset.path={folder / 'corpus'}", *more]
    parse_config(SETTINGS, overrides)
    if launcher and not Path("/proc/self").exists():
        raise StormError("--launcher finds the processes of torchrun in /proc, which is not there; leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus", seed=seed)
    config_file = folder / "storm.yaml"
    config_file.write_text(SETTINGS)

    lives = Lives()
    try:
        start = partial(
            run_storm, lives, config_file, overrides=overrides, world=world, launcher=launcher, into_saves=into_saves
        )
        return _compare(lives, config_file, overrides, folder, start, kills=kills, life=life, seed=seed, world=world)
    finally:
        lives.close()


def _compare(
    lives: Lives,
    config_file: Path,
    overrides: list[str],
    folder: Path,
    start: Callable[..., Storm],
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
        storm = start(out, max_kills=kills - total, life=life, seed=seed * 1000 + len(storms))
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
