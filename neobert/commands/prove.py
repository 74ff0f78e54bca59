"""Does a run's record hold? Steps between its checkpoints are made again, and all that has a digest is compared.

What this shows is consistency: this log, these checkpoints, this data and this code belong together. What it cannot
show is in `NOT_PROVEN`.
"""

import math
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neobert import cli
from neobert.commands.flags import add_json, build_parser, count, print_answer
from neobert.errors import CallError, DataError, UserError

if TYPE_CHECKING:
    from neobert.train.checkpoint.proof.retrain import Retrained
    from neobert.train.checkpoint.proof.stretches import Segment

Verdict = Literal["ok", "rounding", "open", "FAIL"]

NOT_PROVEN = (
    "steps before the first checkpoint that is kept, unless --from-start",
    "that the texts are what their names say: of large data a fingerprint hashes a sample",
    "evaluations, times and memory in the log",
    "that nobody trained the whole run again with other numbers: a digest that was published in time shows that",
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One row of the table."""

    name: str
    verdict: Verdict
    """`ok`: bit for bit. `rounding`: equal as far as another machine or code can show. `open`: cannot be decided here.
    `FAIL`: something is not what the record says."""

    detail: str


def prove(program: str, argv: list[str]) -> int:
    """Make random steps of a run again, and compare them and its checkpoints with what it recorded.

    neobert prove RUN
    neobert prove RUN --samples 5 --limit 50 --export FOLDER

    Draws random steps between the checkpoints that are kept, and makes the whole stretch between the two checkpoints
    around each again, on this machine. Exit code 0 when nothing differs, else 1.
    """
    parser = build_parser(program, prove.__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--samples", type=count, default=20, metavar="N", help="random steps (default 20)")
    parser.add_argument("--limit", type=count, metavar="N", help="make at most N steps after a checkpoint again")
    parser.add_argument("--from-start", action="store_true", help="also from the first step, without a checkpoint")
    parser.add_argument("--seed", type=int, help="of the random steps (default: another one each time)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="also check that an exported folder is of this run"
    )
    add_json(parser)
    args = parser.parse_args(argv)
    if not (args.run / "log.jsonl").is_file():
        raise CallError(f"{args.run} holds no log.jsonl; name the output folder of a run (its trainer.output_dir)")
    seed = secrets.randbits(32) if args.seed is None else args.seed
    evidence, found = examine_run(
        args.run, num_samples=args.samples, limit=args.limit, from_start=args.from_start, seed=seed
    )
    if args.export is not None:
        evidence += examine_export(args.run, args.export)
    passed = all(x.verdict != "FAIL" for x in evidence)
    data = {
        "passed": passed,
        "seed": seed,
        "evidence": [asdict(x) for x in evidence],
        "probabilities": found,
        "not_proven": list(NOT_PROVEN),
    }
    print_answer(data, _describe(evidence, found, seed, passed), as_json=args.json)
    return 0 if passed else 1


def examine_run(
    run: Path, *, num_samples: int, limit: int | None, from_start: bool, seed: int
) -> tuple[list[Evidence], dict[str, float]]:
    """The evidence about a run, and with what probability a change of each kind is found.

    Raises:
        CallError: there are no two checkpoints to make anything between, and `from_start` is not set.
    """
    from neobert.train.checkpoint.proof.digest_chain import read_steps
    from neobert.train.checkpoint.proof.stretches import choose_segments, find_probabilities, list_segments
    from neobert.weights.folder import checkpoint_steps

    lines = read_steps(run)
    log, kept = {line["step"]: line for line in lines}, checkpoint_steps(run)
    segments = list_segments(kept, from_start=from_start)
    if not segments:
        raise CallError(
            f"{run} has {len(kept)} checkpoint(s), so there are no steps between two; --from-start makes them again "
            "from the first step"
        )
    unclear = {x: reason for x in segments if (reason := find_branch(run, x)) is not None}
    unmade = [Evidence(f"steps {x.start + 1}-{x.end}", "open", reason) for x, reason in unclear.items()]
    first, last = segments[0].start, segments[-1].end
    segments = [x for x in segments if x not in unclear]
    num_noted, checkpoints = examine_checkpoints(run, kept)
    evidence = [_examine_log(lines, first, last), *checkpoints, *_examine_rates(run, segments, log), *unmade]
    chosen = choose_segments(segments, num_samples, seed)
    steps = sum(min(x.num_steps, limit or x.num_steps) for x in chosen)
    cli.say(
        f"{steps:,} steps of {len(lines):,} are made again, from {len(chosen)} of {len(segments)} checkpoints that are "
        "followed by another"
    )
    made = [_retrain(run, x, log, limit) for x in chosen]
    evidence += [row for rows, _ in made for row in rows]
    exact = [x for x, (_, is_exact) in zip(chosen, made) if is_exact]
    batches = [_read_batches(run, x, log) for x in segments if x not in chosen]
    evidence += [row for row in batches if row is not None]
    return evidence, find_probabilities(segments, exact, limit, noted=num_noted, unclear=tuple(unclear))


def find_branch(run: Path, segment: "Segment") -> str | None:
    """Why the steps of a segment cannot be made from its start alone; None where they can."""
    from neobert.train.start import read_train_state

    try:
        saved = read_train_state(run / "checkpoints" / str(segment.end))
        before = read_train_state(run / "checkpoints" / str(segment.start)) if segment.start else {}
    except UserError:
        return None  # What is damaged is found elsewhere.
    if saved.get("skip_rows", []) != before.get("skip_rows", []):
        return "the run went back to a checkpoint here, and skipped rows that the first of the two did not know of"
    declared = [x for x in saved["lineage"] if segment.start < x["step"] < segment.end and x["resume_allow"]]
    if declared:
        return f"at step {declared[0]['step']:,} the run resumed with other settings, and that checkpoint is not kept"
    return None


def _examine_log(lines: Sequence[Mapping[str, Any]], first: int, last: int) -> Evidence:
    log = {line["step"]: line for line in lines}
    if len(log) < len(lines):
        return Evidence("log", "FAIL", f"{len(lines) - len(log):,} steps are there more than once")
    missing = [step for step in range(first + 1, last + 1) if step not in log]
    if missing:
        return Evidence("log", "FAIL", f"{len(missing):,} steps are missing, the first is {missing[0]:,}")
    odd = [step for step, x in log.items() if not _fits(x, "loss") or not _fits(x, "grad_norm")]
    if odd:
        return Evidence("log", "FAIL", f"step {odd[0]:,}: loss or grad_norm is not its *_hex")
    return Evidence("log", "ok", f"steps {first + 1:,} to {last:,} are there, each once")


def _fits(line: Mapping[str, Any], name: str) -> bool:
    try:
        value, exact = line.get(name), float.fromhex(line[f"{name}_hex"])
    except (KeyError, TypeError, ValueError):
        return False
    return value == exact or (value is None and not math.isfinite(exact))


def examine_checkpoints(run: Path, kept: Sequence[int]) -> tuple[int, list[Evidence]]:
    """Every file against its manifest, every manifest against what the save noted in `events.jsonl`; and of how many
    checkpoints a save noted that."""
    from neobert.train.report.log_reader import read_events
    from neobert.weights.folder import CheckpointError, check_contents

    events = [x for x in read_events(run / "events.jsonl") if x.get("event") == "saved" and x.get("manifest")]
    noted = {x["step"]: x["manifest"] for x in events}
    rows = []
    for step in kept:
        try:
            manifest = check_contents(run / "checkpoints" / str(step))
        except CheckpointError as error:
            rows.append(Evidence(f"checkpoint {step}", "FAIL", str(error)))
            continue
        if step in noted and noted[step] != manifest.digest:
            rows.append(
                Evidence(f"checkpoint {step}", "FAIL", "its manifest is not the one that events.jsonl has of it")
            )
    if not rows:
        detail = (
            f"{len(kept)} have the files of their manifests, {len(noted.keys() & set(kept))} the manifests noted then"
        )
        rows = [Evidence("checkpoints", "ok", detail)]
    return len(noted.keys() & set(kept)), rows


def _examine_rates(run: Path, segments: "Sequence[Segment]", log: Mapping[int, Any]) -> Iterator[Evidence]:
    """The learning rates of the log against the schedule of the config that each segment was trained with."""
    from neobert.optim.schedule import build_schedule
    from neobert.train.start import read_checkpoint_config, read_train_state

    for segment in segments:
        end = run / "checkpoints" / str(segment.end)
        try:
            config, saved = read_checkpoint_config(end), read_train_state(end)
        except UserError as error:
            yield Evidence("rates", "FAIL", str(error))
            return
        schedule = build_schedule(config.scheduler, base_lr=config.optimizer.lr, num_steps=saved["num_steps"])
        steps = (step for step in range(segment.start + 1, segment.end + 1) if step in log)
        odd = next((step for step in steps if log[step].get("lr") != schedule(step - 1)), None)
        if odd is not None:
            detail = f"step {odd:,}: the log has {log[odd].get('lr')}, the schedule {schedule(odd - 1)}"
            yield Evidence("rates", "FAIL", detail)
            return
    yield Evidence("rates", "ok", f"{sum(x.num_steps for x in segments):,} are those of the schedule")


def _retrain(run: Path, segment: "Segment", log: Mapping[int, Any], limit: int | None) -> tuple[list[Evidence], bool]:
    """What training a segment again shows, and whether it was compared bit for bit."""
    from neobert.train.checkpoint.proof.retrain import retrain_segment

    name = f"steps {segment.start + 1}-{segment.end}"
    cli.say(f"{name} ...")
    with tempfile.TemporaryDirectory() as work:
        try:
            made = retrain_segment(run, segment, log, limit=limit, work=Path(work))
        except DataError as error:  # Not there, or not as it was: nothing is known of the steps.
            return [Evidence(name, "open", " ".join(str(error).split()))], False
        except UserError as error:
            return [Evidence(name, "FAIL", " ".join(str(error).split()))], True
    changed = list_changes(run, segment.end, made.machine)
    is_exact = not (made.num_different and changed)
    return [*_judge_steps(name, made, changed), *_judge_end(name, made, changed)], is_exact


def list_changes(run: Path, step: int, machine: Mapping[str, Any]) -> list[str]:
    """What may make other bits here than where the run was trained; empty where nothing is known to."""
    from neobert.train.report.log_reader import read_events
    from neobert.train.start import read_checkpoint_config

    events = read_events(run / "events.jsonl")
    noted = [x.get("machine") for x in events if x.get("event") == "environment"]
    names = [name for name in machine if name not in ("system", "python", "processes")]
    changed = [name for name in names if any((x or {}).get(name) != machine[name] for x in noted)]
    changed += ["processes"] if any(x.get("processes", 1) != 1 for x in events) else []
    changed += ["micro-batches"] if len({x["micro_batch_rows"] for x in events if "micro_batch_rows" in x}) > 1 else []
    on_gpu = not str(machine.get("device")).startswith("cpu")
    if on_gpu and not read_checkpoint_config(run / "checkpoints" / str(step)).trainer.deterministic:
        changed.append("order of additions (trainer.deterministic: false)")
    return changed if noted else [*changed, "machine (which the run did not note)"]


TOLERANCE = {False: 1e-4, True: 2e-2}
"""Relative, of a loss from the same weights on another machine: with fp32, with bf16."""


def _judge_steps(name: str, made: "Retrained", changed: Sequence[str]) -> Iterator[Evidence]:
    if made.other_batch is not None:
        yield Evidence(name, "FAIL", f"step {made.other_batch:,} has other rows or masks: the data changed, or the log")
    elif not made.num_different:
        yield Evidence(name, "ok", f"{made.num_steps:,} steps bit-identical in {made.seconds:.0f} s")
    elif not changed:
        yield Evidence(name, "FAIL", f"{made.num_different:,} of {made.num_steps:,} differ: {made.first_difference}")
    else:
        verdict: Verdict = "rounding" if made.first_loss_difference <= TOLERANCE[made.bf16] else "FAIL"
        yield Evidence(
            name,
            verdict,
            f"batches are equal, bits are not, and cannot be: other {', '.join(changed)}; the loss of the first step "
            f"differs by {made.first_loss_difference:.1e} (at most {TOLERANCE[made.bf16]:g} is rounding); later steps "
            "drift apart and show nothing",
        )


def _judge_end(name: str, made: "Retrained", changed: Sequence[str]) -> Iterator[Evidence]:
    if made.other_tensors is None or (made.num_different and changed):
        return
    end = f"checkpoint {made.segment.end}"
    if made.other_tensors:
        detail = (
            f"{len(made.other_tensors)} tensors differ from what {name} lead to: {', '.join(made.other_tensors[:3])}"
        )
        yield Evidence(end, "FAIL", detail)
    else:
        yield Evidence(end, "ok", f"weights and optimizer are bit for bit what {name} lead to")


def _read_batches(run: Path, segment: "Segment", log: Mapping[int, Any]) -> Evidence | None:
    """Of a segment that is not made again, its batches alone."""
    from neobert.train.checkpoint.proof.retrain import read_batches

    name = f"batches {segment.start + 1}-{segment.end}"
    with tempfile.TemporaryDirectory() as work:
        try:
            other = read_batches(run, segment, log, work=Path(work))
        except DataError as error:
            return Evidence(name, "open", " ".join(str(error).split()))
        except UserError as error:
            return Evidence(name, "FAIL", " ".join(str(error).split()))
    return None if other is None else Evidence(name, "FAIL", f"step {other:,} has other rows or masks")


def examine_export(run: Path, folder: Path) -> list[Evidence]:
    """Whether an exported folder is of this run: its digest chain, its file, its weights.

    Raises:
        CallError: it has no `training_proof.json`.
    """
    from neobert.config.nesting import parse_json
    from neobert.train.checkpoint.proof.digest_chain import PROOF_FILE, chain_steps, list_digests, read_steps
    from neobert.weights.folder import MODEL_FILE, record_file

    path = folder / PROOF_FILE
    if not path.is_file():
        raise CallError(f"--export: {folder} has no {PROOF_FILE}; export the run again with neobert export")
    proof, lines = parse_json(path.read_text()), read_steps(run)
    chains = dict(chain_steps(proof, [x for x in lines if x["step"] <= proof["step"]]))
    other = [x["step"] for x in proof["milestones"] if chains.get(x["step"]) != x["chain"]]
    if other or chains.get(proof["step"]) != proof["chain"]:
        detail = (
            f"step {other[0] if other else proof['step']:,} is the first milestone whose chain the log does not lead to"
        )
        rows = [Evidence("export: chain", "FAIL", detail)]
    else:
        rows = [Evidence("export: chain", "ok", f"{len(chains):,} steps lead to {proof['chain'][:16]}...")]
    now = list_digests(run, up_to=proof["step"])
    changed = [step for step, digest in proof["checkpoints"].items() if step in now and now[step] != digest]
    if changed:
        rows.append(Evidence("export: checkpoints", "FAIL", f"that of step {changed[0]} has changed since the export"))
    if record_file(folder / MODEL_FILE).sha256 != proof["exported"]["sha256"]:
        rows.append(Evidence("export: file", "FAIL", f"{MODEL_FILE} is not the one that was exported"))
    return [*rows, _compare_exported(run, folder, proof)]


def _compare_exported(run: Path, folder: Path, proof: Mapping[str, Any]) -> Evidence:
    import torch
    from safetensors.torch import load_file

    from neobert.export.write import ExportRequest, convert_again
    from neobert.weights.folder import MODEL_FILE

    name, checkpoint = "export: weights", run / "checkpoints" / str(proof["step"])
    if not checkpoint.is_dir():
        return Evidence(name, "open", f"the checkpoint of step {proof['step']:,} is not kept")
    settings = proof["exported"]["settings"]
    with tempfile.TemporaryDirectory() as work:
        request = ExportRequest(source=str(checkpoint), output=Path(work) / "again", **settings)
        expected = convert_again(request)
    found = load_file(folder / MODEL_FILE)
    odd = [x for x in found.keys() | expected if x not in found or x not in expected]
    odd += [x for x in found.keys() & expected if not torch.equal(found[x], expected[x])]
    if odd:
        return Evidence(
            name, "FAIL", f"{len(odd)} tensors are not those of step {proof['step']:,}: {', '.join(odd[:3])}"
        )
    return Evidence(name, "ok", f"{len(found)} tensors are bit for bit those of step {proof['step']:,}")


# ---- as text ----

_FOUND = {
    "step": "a step that was computed otherwise, or its line",
    "batch": "a batch of other rows or masks",
    "rate": "a learning rate",
    "weight": "a weight of a checkpoint, its manifest written to fit",
    "weight_and_events": "the same, events.jsonl written to fit too",
}


def _describe(evidence: Sequence[Evidence], found: Mapping[str, float], seed: int, passed: bool) -> str:
    width = max(len(x.name) for x in evidence)
    lines = [f"{x.verdict:<8}  {x.name:<{width}}  {x.detail}" for x in evidence]
    lines += ["", "probability that one change, at random among these steps or checkpoints, is found:"]
    lines += [f"  {found[name]:7.2%}  {text}" for name, text in _FOUND.items()]
    lines += ["", "not proven:", *(f"  {text}" for text in NOT_PROVEN)]
    verdict = "nothing differs" if passed else "something differs"
    if passed and any(x.verdict == "open" for x in evidence):
        verdict += " of what could be compared"
    lines += ["", f"{verdict} (--seed {seed})"]
    return "\n".join(lines)
