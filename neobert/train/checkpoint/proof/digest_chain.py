"""The digest chain of a run: one SHA-256 that depends on every step of `log.jsonl`, on the data and on the tokenizer.

    chain of step 0   sha256 of the data's fingerprint and the tokenizer's digest
    chain of step s   sha256 of the chain before it and what must repeat of step s: number, batch, rate, loss, norm

An exported folder carries some of its values (`PROOF_FILE`), so that a log that is changed later no longer fits it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neobert.train.checkpoint.audit import EXACT, Line
from neobert.train.record.sinks import LineFile
from neobert.train.report.log_reader import read_events
from neobert.train.start import read_train_state
from neobert.weights.folder import EMA_FILE, MODEL_FILE, CheckpointError, read_manifest, record_file, valid_steps

PROOF_FILE = "training_proof.json"
NUM_MILESTONES = 32
"""Steps of a run of which an export has the chain, beside the last."""

_OF_THE_RUN = ("data_fingerprint", "tokenizer_digest", "config_digest", "versions", "rows_per_step", "tokens")
_OF_THE_MACHINE = ("code", "device", "precision", "attention", "compiled")


def read_steps(run: Path) -> list[Line]:
    """The lines of the steps of a run, in their order."""
    return [line for line in LineFile(run / "log.jsonl").read() if line.get("kind") == "step"]


def chain_steps(identity: Mapping[str, Any], lines: Iterable[Line]) -> Iterator[tuple[int, str]]:
    """(step, its chain) of every line; `identity` is a `train_state.json`, or what a proof has of it."""
    chain = _hash([identity["data_fingerprint"], identity["tokenizer_digest"]])
    for line in lines:
        chain = _hash([chain, line["step"], *(line.get(name) for name in EXACT)])
        yield line["step"], chain


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def build_proof(checkpoint: Path, kind: str = "model") -> dict[str, Any] | None:
    """What an export of a checkpoint says of the training behind it, JSON-ready; None where its run or log is gone.

    Args:
        kind: of the weights, `model` or `ema`.
    """
    run = checkpoint.parent.parent
    if not checkpoint.name.isdecimal() or not (checkpoint / "train_state.json").is_file():
        return None
    step = int(checkpoint.name)
    lines = [line for line in read_steps(run) if line["step"] <= step]
    if not lines or lines[-1]["step"] != step:
        return None
    state = read_train_state(checkpoint)
    chains = dict(chain_steps(state, lines))
    shown = {lines[round(n * (len(lines) - 1) / NUM_MILESTONES)]["step"] for n in range(NUM_MILESTONES + 1)}
    noted = [x.get("machine") or {} for x in read_events(run / "events.jsonl") if x.get("event") == "environment"]
    return {
        "format": 1,
        "step": step,
        "first_step": lines[0]["step"],
        **{name: state.get(name) for name in _OF_THE_RUN},
        "resumes": [{"step": x["step"], "resume_allow": x["resume_allow"]} for x in state.get("lineage", [])],
        "machines": [{name: machine.get(name) for name in _OF_THE_MACHINE} for machine in noted],
        "weights": {"kind": kind, "sha256": record_file(checkpoint / WEIGHT_FILES[kind]).sha256},
        "checkpoints": list_digests(run, up_to=step),
        "milestones": [
            {"step": x["step"], **{name: x.get(name) for name in EXACT}, "chain": chains[x["step"]]}
            for x in lines
            if x["step"] in shown
        ],
        "chain": chains[step],
    }


WEIGHT_FILES = {"model": MODEL_FILE, "ema": EMA_FILE}


def list_digests(run: Path, *, up_to: int) -> dict[str, str]:
    """The digests of the manifests of the checkpoints that are kept, by step."""
    found = {}
    for step in valid_steps(run):
        if step <= up_to:
            try:
                found[str(step)] = read_manifest(run / "checkpoints" / str(step)).digest
            except CheckpointError:
                continue
    return found
