"""Probes: what the encoder knows now, measured beside the training and without changing it.

Every `trainer.probe_steps` steps, at the start and at the end. Vectors are means over the last hidden states of all
tokens of a text, as `neobert embed` makes them. Processes split the texts and the rows, so their number does not matter
beyond rounding. Blocks run uncompiled: texts have many shapes. What a probe costs is measured and recorded with it.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neobert.correlation import spearman
from neobert.inference.model import Model
from neobert.inference.packed import BATCH_TOKENS, evaluating
from neobert.train.hardware.machine import Runtime
from neobert.train.probes.frozen_states import knn_accuracy, ridge_accuracy
from neobert.train.probes.labelled_sets import ProbeSet
from neobert.train.probes.loss_bands import BandLoss, measure
from neobert.train.probes.pinned import Probes
from neobert.train.probes.result import LOSSES, ProbeResult
from neobert.train.processes.agreement import broadcast, exchange, send_rows_to_main, sharing_errors
from neobert.train.run import Run
from neobert.types import TrainState

MOST_OF_RUN = 0.01
"""Above this fraction of the time of a run, a probe is warned about."""


def probing_missing(run: Run, state: TrainState) -> bool:
    """Whether probes belong to this state and are not in the log."""
    if run.probes is None:
        return False
    assert run.config.trainer.probe_steps is not None
    belongs = state.step % run.config.trainer.probe_steps == 0 or state.step == run.num_steps
    return belongs and not run.tracker.probed(state.step)


def log_probes(run: Run, state: TrainState) -> None:
    """Probes the weights, and their average where there is one, and records both with what they cost. Collective.

    Raises:
        RankError: another rank failed.
    """
    probes = run.probes
    assert probes is not None
    seconds: dict[str, float] = {}
    with run.tracker.paused(), sharing_errors(run.runtime):
        found = {"probe": _probe(run, probes, seconds)}
        if run.average is not None and run.average.started:
            with run.average.swapped():
                found["probe_ema"] = _probe(run, probes, seconds)
    for name, value in seconds.items():
        probes.spent[name] = probes.spent.get(name, 0.0) + value
    fractions: dict[str, float] = {}
    if run.tracker.trained:  # Before the first step there is no run to be a fraction of.
        elapsed = time.perf_counter() - probes.started
        fractions = {name: value / elapsed for name, value in probes.spent.items()}
    run.tracker.log_probes(state, found, seconds=seconds, fractions=fractions, fingerprints=probes.fingerprint)
    for name, fraction in fractions.items():
        if fraction > MOST_OF_RUN and name not in probes.warned:
            probes.warned.add(name)
            run.tracker.warn(
                f"the probe {name} took {fraction:.1%} of the time of this run so far; raise trainer.probe_steps, or "
                f"lower trainer.{'probe_tokens' if name == LOSSES else 'probe_examples'}"
            )


def _probe(run: Run, probes: Probes, seconds: dict[str, float]) -> ProbeResult:
    """One kind of weights; adds to `seconds`, by probe. Collective."""
    model = run.as_model()
    sets: dict[str, dict[str, float | None]] = {}
    losses: dict[str, dict[str, BandLoss]] = {}
    with (
        evaluating(model.module),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        run.runtime.accelerator.autocast(),
    ):
        for one in probes.sets:
            start = time.perf_counter()
            vectors = _embed(run.runtime, model, one.documents)
            sets[one.name] = broadcast(run.runtime, {} if vectors is None else score_set(one, vectors))
            seconds[one.name] = seconds.get(one.name, 0.0) + time.perf_counter() - start
        if probes.losses is not None:
            assert run.objective.target_losses is not None
            start = time.perf_counter()
            sums = measure(probes.losses, model.module, run.objective.target_losses)
            losses = probes.losses.name(np.sum(exchange(run.runtime, sums), axis=0))
            seconds[LOSSES] = seconds.get(LOSSES, 0.0) + time.perf_counter() - start
    return ProbeResult(sets=sets, losses=losses)


def _embed(runtime: Runtime, model: Model, documents: Sequence[NDArray[Any]]) -> NDArray[np.float32] | None:
    """Mean vectors `[texts, H]` on rank 0, None on the others; each embeds its part. Collective."""
    mine = documents[runtime.rank :: runtime.world]
    vectors = model.embed_tokens(mine, pooling="mean", normalize=False, batch_tokens=BATCH_TOKENS).numpy()
    return send_rows_to_main(runtime, vectors, len(documents))


def score_set(one: ProbeSet, vectors: NDArray[np.float32]) -> dict[str, float | None]:
    """The metrics of a set by the vectors `[texts, H]` of its documents; None where they are not finite."""
    is_finite = bool(np.isfinite(vectors).all())
    if one.classes is not None:
        both = {"knn": knn_accuracy, "ridge": ridge_accuracy}
        return {name: metric(vectors, one.classes) if is_finite else None for name, metric in both.items()}
    assert one.scores is not None
    if not is_finite:
        return {"spearman": None}
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    cosines = (units[: len(one.scores)] * units[len(one.scores) :]).sum(axis=1)
    return {"spearman": spearman(cosines, one.scores)}
