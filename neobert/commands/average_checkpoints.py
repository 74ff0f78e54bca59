"""The mean of several checkpoints of one run, as a model of its own.

Averaging the last checkpoints of a run acts like a longer decay of the learning rate: noise of the last steps cancels
(Izmailov et al., arXiv 1803.05407; of pretraining, Sanyal et al., arXiv 2306.03241). ModernBERT averages checkpoints of
its decay (arXiv 2412.13663).

The folder that is written has weights, architecture, tokenizer and config, under a manifest, and `average.json` with
what went into it. It has no optimizer and no position in the data: `model.init_from` starts from it, nothing resumes
it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neobert.config.nesting import parse_json
from neobert.weights.encoder_weights import WEIGHTS
from neobert.weights.folder import (
    AVERAGE_FILE,
    HEAD_FILE,
    MODEL_FILE,
    CheckpointError,
    check_contents,
    valid_steps,
    write_manifest,
)

_COPIED = ("model_config.json", "tokenizer_info.json", "tokenizer")
"""What all of the averaged checkpoints must have alike, and the average has from them."""

_OF_THE_NEWEST = ("config.yaml", HEAD_FILE)
"""What it has from the newest one, where that has it: pooling, labels, and what an export says of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageRequest:
    """What to average."""

    run: Path
    output: Path
    last: int | None = None
    """The newest so many checkpoints; 5 when neither this nor `steps` is set."""

    steps: tuple[int, ...] | None = None
    """These, instead of the newest."""

    shares: tuple[float, ...] | None = None
    """Weight of each, oldest first or in the order of `steps`; they are divided by their sum. None: all alike."""

    weights: str = "model"
    """A key of WEIGHTS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Averaged:
    """What was averaged; the content of `average.json`."""

    run: str
    steps: tuple[int, ...]
    shares: tuple[float, ...]
    weights: str

    def describe(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{step} x {share:.4g}" for step, share in zip(self.steps, self.shares))
        return f"the mean of {len(self.steps)} checkpoints of {self.run} (step x weight): {parts}"


def average_checkpoints(request: AverageRequest) -> Averaged:
    """Writes `request.output`; every byte of the checkpoints is verified before.

    Raises:
        CheckpointError: the checkpoints are not there, are damaged or of different architectures, or the output exists.
    """
    plan = _make_plan(request)
    folders = [request.run / "checkpoints" / str(step) for step in plan.steps]
    for folder in folders:
        try:
            check_contents(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} is damaged: {error}; name others with --steps") from error
    _check_variant(folders[-1])
    _check_alike(folders)
    name = WEIGHTS[request.weights][0]
    tensors = average_files([folder / name for folder in folders], plan.shares)
    temporary = request.output.with_name(f".tmp-{request.output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"--output: {request.output} cannot be made ({error.strerror})") from error
    try:
        _write(temporary, folders[-1], tensors, plan)
        temporary.rename(request.output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return plan


def _make_plan(request: AverageRequest) -> Averaged:
    if request.output.exists():
        raise CheckpointError(f"--output: {request.output} exists already; choose another folder, or remove it")
    if request.weights not in WEIGHTS:
        raise CheckpointError(f"--weights: {request.weights!r} is unknown; write {' or '.join(WEIGHTS)}")
    if not request.run.is_dir():
        reason = "is not a folder" if request.run.exists() else "does not exist"
        raise CheckpointError(f"{request.run} {reason}; give the folder of a run, which has checkpoints/ in it")
    there, steps = valid_steps(request.run), request.steps
    if not there:
        raise CheckpointError(f"{request.run} holds no whole checkpoint; give the folder of a run")
    known = ", ".join(map(str, there))
    if steps is None:
        last = 5 if request.last is None else request.last
        if not 1 <= last <= len(there):
            raise CheckpointError(
                f"--last: {last}, but {request.run} has {len(there)} whole checkpoint(s) (steps: {known}); raise "
                "trainer.save_total_limit to keep more of them"
            )
        steps = tuple(there[-last:])
    elif request.last is not None:
        raise CheckpointError(f"--last: {request.last} is set beside --steps; leave out one of the two")
    missing = sorted(set(steps) - set(there))
    if missing or len(set(steps)) < len(steps) or not steps:
        raise CheckpointError(
            f"--steps: {', '.join(map(str, missing or steps)) or 'nothing'}: each must be a different step with a whole"
            f" checkpoint; {request.run} has: {known}"
        )
    shares = (1.0,) * len(steps) if request.shares is None else request.shares
    if len(shares) != len(steps) or not all(0 <= share < float("inf") for share in shares) or not sum(shares):
        raise CheckpointError(
            f"--shares: {', '.join(map(str, shares))}: write one number of at least 0 for each of the {len(steps)}"
            " checkpoints, not all of them 0"
        )
    total = sum(map(Fraction, shares))
    exact = tuple(float(Fraction(share) / total) for share in shares)
    return Averaged(run=str(request.run), steps=steps, shares=exact, weights=request.weights)


def _check_variant(folder: Path) -> None:
    config = parse_json((folder / "model_config.json").read_text())
    if config.get("ngpt"):
        raise CheckpointError(
            f"{folder} is of model.ngpt: true, whose vectors have length 1, and the mean of such vectors is shorter; "
            "take its last checkpoint as it is"
        )


def _check_alike(folders: Sequence[Path]) -> None:
    reference = folders[0]
    for other in folders[1:]:
        for name in _COPIED:
            ours, theirs = _contents(reference / name), _contents(other / name)
            if ours != theirs:
                odd = sorted({str(key) for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)})
                raise CheckpointError(
                    f"{reference} and {other} differ in {name} ({', '.join(odd)}): only checkpoints of one architecture"
                    " with one tokenizer can be averaged; name others with --steps"
                )


def _contents(path: Path) -> dict[str, object]:
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return dict(parse_json(path.read_text()))


def average_files(paths: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """The sum of `share * tensor` over files of equal tensors: added in fp64, returned in the dtype of the first file.

    One tensor of all files is in memory at a time, besides the result.

    Raises:
        CheckpointError: a file is missing, or has other tensors than the first.
    """
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: only runs with trainer.ema_decay have an average of that kind")
    files = [safe_open(path, framework="pt") for path in paths]
    shapes = [{name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} for file in files]  # noqa: SIM118
    for path, theirs in zip(paths, shapes):
        if theirs != shapes[0]:
            odd = sorted(n for n in theirs.keys() | shapes[0].keys() if theirs.get(n) != shapes[0].get(n))
            raise CheckpointError(f"{paths[0]} and {path} hold different tensors: {', '.join(odd)}")
    result = {}
    for name in shapes[0]:
        first = files[0].get_tensor(name)
        total = torch.zeros(first.shape, dtype=torch.float64)
        for file, share in zip(files, shares):
            total.add_(file.get_tensor(name).double(), alpha=share)
        result[name] = total.to(first.dtype)
    return result


def _write(folder: Path, newest: Path, tensors: dict[str, Tensor], plan: Averaged) -> None:
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    (folder / MODEL_FILE).chmod(0o644)
    for name in (*_COPIED, *(name for name in _OF_THE_NEWEST if (newest / name).is_file())):
        (shutil.copytree if (newest / name).is_dir() else shutil.copyfile)(newest / name, folder / name)
    (folder / AVERAGE_FILE).write_text(json.dumps(asdict(plan), indent=2) + "\n")
    write_manifest(folder, max(plan.steps))
