"""How ranks come to one decision, and how an error of one of them ends them all.

Whatever a rank reads from its own disk, environment or machine may differ from what the others read. So a start runs
within `sharing_errors`, and every collective of a start begins with `meet`: a rank that fails joins the meeting that
the others wait in and hands them its sentence, wherever each of them is. Nobody hangs and nobody ends with an error of
the process group. `check_equal` compares what has to be equal and names what is not.

Equal have to be the settings, the code and packages, and the checkpoint that a run resumes from. Paths, threads and
trackers are a machine's own: what is found under a path is compared instead (the fingerprint of the data, the digest of
the tokenizer, the initial weights).
"""

import functools
import hashlib
import json
import pickle
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

import neobert
from neobert.config.fields import FIELDS, Field
from neobert.config.schema import Config
from neobert.data.source.one_reader import Seen, see
from neobert.errors import StartupError, UserError
from neobert.secrets import scrub
from neobert.weights.folder import MANIFEST

if TYPE_CHECKING:
    from neobert.train.hardware.machine import Runtime


def join_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open ranges of the numbers: 3 4 5 9 -> (3, 6), (9, 10)."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges


def describe_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """`3 to 5, 9` for (3, 6), (9, 10)."""
    return ", ".join(str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in ranges)


T = TypeVar("T")

Facts = Mapping[str, Any]
"""What has to be equal on all ranks, by name; values that JSON can hold."""

_SHOWN = 80
"""Characters of a value in a message."""

_MOST_LINES = 12
"""Of differences in a message."""


class RankError(StartupError):
    """Ranks differ, or another rank cannot continue. Raised on every rank, or on those that learn it from another."""


def exchange(runtime: "Runtime", value: T | None = None, *, failure: Exception | None = None) -> list[T]:
    """Every rank's picklable value in rank order, on every rank; waits for the slowest, however long that takes.

    Args:
        failure: why this rank cannot continue.

    Raises:
        RankError: another rank has a failure; the message is that rank's.
        Exception: `failure`, when the others know.
    """
    meet(runtime, failure=failure)
    with _naming_lost(runtime):
        return runtime.gather_objects(value, patient=True)


def meet(runtime: "Runtime", *, failure: Exception | None = None, flag: bool = False) -> int:
    """How many ranks have set `flag`, when all are here; what every exchange begins with. 16 bytes for any number of
    ranks.

    Raises:
        RankError: another rank has a failure; the message is that rank's.
        Exception: `failure`, when the others know.
    """
    with _naming_lost(runtime, failure):
        num_failed, num_flags = runtime.sum_on_host([int(failure is not None), int(flag)], patient=True)
        if num_failed:
            problem = None if failure is None else _describe_failure(failure)
            problems = runtime.gather_objects(problem, patient=True)
    if failure is not None:
        raise failure
    if num_failed:
        rank, text = next((rank, text) for rank, text in enumerate(problems) if text is not None)
        raise RankError(f"rank {rank}: {text}")
    return num_flags


@contextmanager
def _naming_lost(runtime: "Runtime", failure: Exception | None = None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # A process was killed, or its machine is gone.
        if failure is not None:
            raise failure from None
        if runtime.heartbeat is not None:
            runtime.heartbeat.explain(error)
        raise RankError(f"another process of this run has ended: {str(error).splitlines()[0]}") from error


def send_to_main(runtime: "Runtime", value: T) -> list[T] | None:
    """Every rank's picklable value in rank order, on rank 0, which alone needs memory for them; None on the others.
    Waits for the slowest. Collective.

    Raises:
        RankError: another rank cannot continue.
    """
    meet(runtime)
    with _naming_lost(runtime):
        return runtime.gather_to_main(value, patient=True)


def send_rows_to_main(runtime: "Runtime", part: NDArray[Any], total: int) -> NDArray[Any] | None:
    """An array with `total` rows on rank 0, of which rank r of R has rows r, r + R, ... as `part`; None on the others.
    Collective."""
    parts = send_to_main(runtime, part)
    if parts is None:
        return None
    result = np.empty((total, *part.shape[1:]), dtype=part.dtype)
    for rank, rows in enumerate(parts):
        result[rank :: runtime.world] = rows
    return result


@contextmanager
def sharing_errors(runtime: "Runtime") -> Iterator[None]:
    """Around work whose only collectives are exchanges: an error of one rank ends every rank. Collective.

    Raises:
        RankError: on the others, with the rank and its sentence.
    """
    try:
        yield
    except RankError:  # All ranks know.
        raise
    except Exception as error:
        meet(runtime, failure=error)
    meet(runtime)


def broadcast(runtime: "Runtime", value: T) -> T:
    """Rank 0's picklable value, on every rank, each of which holds it once; waits for the slowest. Collective.

    Raises:
        RankError: another rank cannot continue.
    """
    meet(runtime)  # Where a rank that fails hands over its sentence.
    with _naming_lost(runtime):
        return runtime.object_from_main(value, patient=True)


def agree(runtime: "Runtime", decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank.

    Raises:
        RankError: on every rank, when rank 0 cannot decide; the message is rank 0's.
    """
    answer: tuple[T | None, str | None] = (None, None)
    if runtime.is_main:
        try:
            answer = (decide(), None)
        except StartupError as error:
            answer = (None, str(error))
    decision, problem = broadcast(runtime, answer)
    if problem is not None:
        raise RankError(problem)
    return decision  # type: ignore[return-value]


class SharedFiles:
    """What rank 0 finds in files, on every rank; a `Share`. Collective, for a block within `sharing_errors`."""

    def __init__(self, runtime: "Runtime") -> None:
        self._runtime = runtime
        self._is_shared = runtime.world > 1

    def __call__(self, find: Callable[[], T], *, path: Sequence[str] = (), seen: Callable[[], Seen] | None = None) -> T:
        """See `Share`.

        Raises:
            RankError: rank 0 cannot find it.
        """
        if not self._is_shared:
            return find()
        runtime, found = self._runtime, None
        message: tuple[bytes, Sequence[str], Seen] = (b"", (), ())
        if runtime.is_main:
            found = find()
            message = (pickle.dumps(found), path, seen() if seen else ())
        packed, its_path, there = broadcast(runtime, message)
        if seen is not None:
            is_same = its_path == path and see([name for name, *_ in there]) == there
            self._is_shared = all(exchange(runtime, is_same))
        if runtime.is_main:
            return found  # type: ignore[return-value]
        return cast(T, pickle.loads(packed)) if self._is_shared else find()


@contextmanager
def main_first(runtime: "Runtime", facts: Facts | None = None) -> Iterator[None]:
    """Rank 0 runs the block before the others do; for a block within `sharing_errors`. Collective.

    Args:
        facts: what the block makes something of that all ranks use; it must be equal.

    Raises:
        RankError: rank 0 failed, or `facts` differ.
    """
    check_equal(runtime, lambda: facts or {})
    if not runtime.is_main:
        meet(runtime)
    yield
    if runtime.is_main:
        meet(runtime)


def check_equal(runtime: "Runtime", describe: Callable[[], Facts]) -> None:
    """Raises when the ranks' facts differ. Costs nothing in a single process. Collective.

    Raises:
        RankError: with every name that differs, the values and their ranks; secrets are hidden.
    """
    if runtime.world == 1:
        return
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in describe().items()}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    if not differ(runtime, digests):
        return
    # Each rank hides its own secrets: another one does not know them.
    shown = {name: (digests[name], _shorten(scrub(text))) for name, text in texts.items()}
    lines = describe_differences(exchange(runtime, shown))
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    raise RankError(
        "\n  ".join(["the processes of this run differ:", *lines[:_MOST_LINES], *more])
        + "\ngive every process the same command, configuration, code, packages and files"
    )


def differ(runtime: "Runtime", values: Mapping[str, Any]) -> bool:
    """Whether any rank has other values than rank 0. Collective."""
    own = _hash(values)
    return meet(runtime, flag=agree(runtime, lambda: own) != own) > 0


def describe_differences(every: Sequence[Mapping[str, tuple[str, str]]]) -> list[str]:
    """One line for each name whose digest is not the same on all ranks. `every`: name -> (digest, text) of each rank.

    >>> describe_differences([{"seed": ("a", "1")}, {"seed": ("b", "2")}, {"seed": ("a", "1")}])
    ['seed: 1 on rank 0, 2; 2 on rank 1']
    """
    lines = []
    for name in dict.fromkeys(name for facts in every for name in facts):
        ranks: dict[tuple[str, str], list[int]] = {}
        for rank, facts in enumerate(every):
            ranks.setdefault(facts.get(name, ("", "nothing")), []).append(rank)
        if len({digest for digest, _ in ranks}) > 1:
            values = "; ".join(f"{text} on rank {describe_ranges(join_ranges(x))}" for (_, text), x in ranks.items())
            lines.append(f"{name}: {values}")
    return lines


def _describe_failure(failure: Exception) -> str:
    """Without the secrets of this rank, which others do not know."""
    text = scrub(str(failure))
    return text if text and isinstance(failure, UserError) else f"{type(failure).__name__}: {text}"


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


version = functools.cache(metadata.version)
"""Of a package; looked up once, since that takes as long as a step of a small model."""

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")
"""Whose versions a checkpoint records."""

READERS = ("datasets", "pyarrow")
"""Packages that read data."""

A_PATH = "(a path)"


def describe_config(config: Config) -> Facts:
    """Every key that decides what is trained or in which order the ranks meet. `wandb` is rank 0's alone, and
    `lock.check_shared` compares the output folder."""
    return {
        key: _without_path(field, field.value_in(config))
        for key, field in FIELDS.items()
        if not field.known.machine and not key.startswith("wandb.")
    }


def _without_path(field: Field, value: Any) -> Any:
    """Of what says where something is, whether it is set is compared, and not its value."""
    if field.key == "dataset.mixture":
        return [asdict(replace(source, path=source.path and A_PATH)) for source in value]
    if field.known.path and (field.key != "trainer.resume_from_checkpoint" or "/" in (value or "")):
        return value and A_PATH
    return [asdict(item) for item in value] if field.item is not None else value


def describe_program() -> Facts:
    """The source code of this package by file, and the versions of Python and of the packages that compute and read."""
    versions: Facts = {f"version of {name}": version(name) for name in (*PACKAGES, *READERS)}
    return {**_describe_code(), "version of Python": platform.python_version(), **versions}


@functools.cache
def digest_code() -> str:
    """16 hex digits over the source code of this package, as it was at the first call."""
    return _hash(_describe_code())[:16]


def _describe_code() -> dict[str, Any]:
    folder = Path(neobert.__file__).parent
    return {
        f"code of neobert/{path.relative_to(folder).as_posix()}": _digest(path) for path in sorted(folder.rglob("*.py"))
    }


def describe_checkpoint(checkpoint: Path | None) -> Facts:
    """The checkpoint that is resumed from, as this rank sees it; nothing but its name where there is none."""
    if checkpoint is None:
        return {"checkpoint": None}
    files = (MANIFEST, "train_state.json", "config.yaml", "model_config.json")
    contents = {f"{name} of the checkpoint": _digest(checkpoint / name) for name in files}
    return {"checkpoint": checkpoint.name} | contents


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
