"""Evaluation: the same documents and masks every time, whatever the training did and however many ranks help."""

from collections.abc import Callable, Iterator

import torch

from neobert.data.pipeline import DataPipeline
from neobert.train.agreement import exchange
from neobert.train.memory import memory_explained
from neobert.train.metrics import EvalMetrics, Evaluation
from neobert.train.replicas import check_replicas
from neobert.train.run import Run
from neobert.types import PackedBatch, TrainState


def log_evaluation(run: Run, state: TrainState, evaluate: Callable[[Run], Evaluation | None]) -> None:
    """Evaluates the weights, and their average where there is one, and records both. Collective.

    When the second of the two is interrupted, neither is recorded: the next start makes both.

    Raises:
        RankError: the ranks hold different weights.
    """
    check_replicas(run, state)
    metrics, averaged = evaluate(run), None
    if metrics is not None and run.average is not None and run.average.begun:
        with run.average.swapped():
            averaged = evaluate(run)
        metrics = metrics if averaged is not None else None
    run.tracker.log_eval(state, metrics, averaged)


@torch.no_grad()
def evaluate(run: Run) -> EvalMetrics | None:
    """Masked-token loss and accuracy on the held-out documents; None when the run has none, or is asked to stop.

    Masks are a function of (trainer.eval_seed, document, position), so two evaluations of the same weights agree, and
    packing, batch size and the number of processes do not matter beyond rounding. All ranks have equally many batches
    and agree before each of them, so that they leave together.
    """
    assert isinstance(run.data, DataPipeline), "the data of pretraining"
    if run.data.eval_set is None:
        return None
    sums = torch.zeros(2, dtype=torch.float64, device=run.runtime.device)
    counts = [0, 0]
    with run.tracker.paused():
        run.model.eval()
        batches = run.data.eval_batches()
        while (batch := _read_batch(run, batches)) is not None:
            if run.stop_requested():
                run.model.train()
                return None
            with memory_explained(run, batch, "eval"):
                loss = run.model(batch.to(run.runtime.device, non_blocking=True))
            sums += torch.stack([loss.loss_sum, loss.num_correct])
            counts = [a + b for a, b in zip(counts, (batch.num_targets, batch.num_tokens))]
        run.model.train()
        loss_sum, num_correct = run.runtime.sum_on_device(sums).tolist()
        num_targets, num_tokens = run.runtime.sum_on_host(counts)
    return EvalMetrics(
        loss=loss_sum / max(num_targets, 1),
        accuracy=num_correct / max(num_targets, 1),
        num_targets=num_targets,
        num_tokens=num_tokens,
        num_documents=run.data.eval_set.num_documents,
    )


def _read_batch(run: Run, batches: Iterator[PackedBatch]) -> PackedBatch | None:
    """The next batch of this rank, None after the last; whether to stop is agreed upon then. Collective.

    Raises:
        RankError: another rank cannot read its documents.
    """
    batch, failure = None, None
    try:
        batch = next(batches, None)
    except Exception as error:  # Raised again below, when the other ranks know.
        failure = error
    failed, *wishes = run.runtime.sum_on_host([int(failure is not None), *run.stop.wishes()])
    if failed:
        exchange(run.runtime, failure=failure)
    run.stop.agree(*wishes)
    return batch
