"""The job of the objectives that read documents.

Evaluation: the same documents and masks every time, whatever the training did and however many ranks help.

What a run says about itself before the first step, and after the last one.
"""

import shlex
from collections.abc import Iterator, Sequence

import torch

from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.config.schema_data import DatacollatorSection
from neobert.data.pipeline import DataPipeline
from neobert.inference.model import Model
from neobert.kernels.linear_cross_entropy import choose_kernel
from neobert.model.peak import name_without_peak
from neobert.objectives.base import Answer, Answers, EvalMetrics, EvalSums, Objective
from neobert.objectives.table import load_part
from neobert.train.checkpoint.replicas import check_replicas
from neobert.train.hardware.machine import describe_compute
from neobert.train.hardware.memory import memory_explained
from neobert.train.processes.agreement import meet
from neobert.train.record.health.watch import measure_weights
from neobert.train.run import Job, Run
from neobert.train.start import write_config
from neobert.types import PackedBatch, TrainState
from neobert.weights.vocabulary import VOCABULARY_TENSORS

SHOWN = 3
"""Guesses shown for each text."""

NUM_TEXTS = 4
"""Evaluation documents that are shown."""


def log_evaluation(run: Run, state: TrainState) -> None:
    """Evaluates the weights, and their average where there is one, and records both. Collective.

    When the second of the two is interrupted, neither is recorded: the next start makes both.

    Raises:
        RankError: the ranks hold different weights.
    """
    check_replicas(run, state)
    averages, averaged = run.average is not None and run.average.started, None
    if run.average is not None and averages:
        with run.average.swapped():
            averaged = run.job.evaluate(run)
    # The weights come last: what a job writes of an evaluation is theirs.
    metrics = run.job.evaluate(run) if not averages or averaged is not None else None
    run.tracker.log_eval(state, metrics, averaged)
    if metrics is not None and run.health is not None:
        run.tracker.note_weights(state.step, measure_weights(run.module))
    look_at_health(run, state)


def look_at_health(run: Run, state: TrainState) -> None:
    """Says what is odd, after something was logged."""
    if run.health is not None and run.runtime.is_main:
        run.health.look(state.step)


def _documents(run: Run) -> DataPipeline:
    assert isinstance(run.data, DataPipeline), "what this job builds"
    return run.data


@torch.no_grad()
def evaluate(run: Run) -> EvalMetrics | None:
    """The objective's metrics on the held-out documents; None when the run has none, or is asked to stop.

    Masks are a function of (trainer.eval_seed, document, position), so two evaluations of the same weights match, and
    packing, batch size and the number of processes do not matter beyond rounding. All ranks have equally many batches
    and agree before each of them, so that they leave together.
    """
    data, build_metrics = _documents(run), run.objective.build_metrics
    if data.eval_set is None or build_metrics is None:
        return None
    device = run.runtime.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # which mps does not have
    sums = torch.zeros(2 + run.objective.num_counts, dtype=wide, device=device)
    counts = [0, 0]
    num_batches = data.eval_set.num_batches(run.runtime.world)
    with run.tracker.paused(), run.reporter.bar("evaluating", num_batches) as advance:
        run.model.eval()
        batches = data.eval_batches()
        while (batch := _read_batch(run, batches)) is not None:
            if run.stop_requested():
                run.model.train()
                return None
            with memory_explained(run, batch, "eval"):
                loss = run.model(batch.to(device, non_blocking=device.type == "cuda"))
            sums += torch.stack([loss.loss_sum, loss.num_correct, *(() if loss.counts is None else loss.counts)])
            counts = [a + b for a, b in zip(counts, (batch.num_targets, batch.num_tokens))]
            advance()
        run.model.train()
        loss_sum, num_correct, *more = run.runtime.sum_on_device(sums).tolist()
        num_targets, num_tokens = run.runtime.sum_on_host(counts)
    return build_metrics(
        EvalSums(
            loss_sum=loss_sum,
            num_correct=num_correct,
            counts=tuple(more),
            num_targets=num_targets,
            num_tokens=num_tokens,
            num_documents=data.eval_set.num_documents,
        )
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
    failed, *requests = run.runtime.sum_on_host([int(failure is not None), *run.stop.requests()])
    if failed:
        meet(run.runtime, failure=failure)
    run.stop.agree(*requests)
    return batch


def announce(run: Run) -> None:
    """Prints the model, the batch, the budget, what was found in the data and what is odd; saves the bound config."""
    config, model, module, objective, data = run.config, run.model_config, run.module, run.objective, _documents(run)
    length, masks, batch = config.dataset.max_seq_length, config.datacollator, data.batch
    rate = _choose_largest_rate(masks, objective) if objective.predicts_tokens else 0.0
    kernel = choose_kernel(config.model.kernel_backend, device=run.runtime.device)
    total = sum(p.numel() for p in module.parameters())
    embeddings = sum(p.numel() for name, p in module.named_parameters() if name in VOCABULARY_TENSORS)
    flops = module.encoder.flops_per_token(attended_length=length, predicted_fraction=rate)
    slots, total_slots = run.rows_per_step * length, batch.rows_before(run.num_steps) * length
    accumulation = run.rows_per_step // (config.trainer.micro_batch_rows * run.runtime.world)
    budget = f"{run.num_steps:,} steps, {total_slots:,} row slots"
    if data.num_tokens:
        budget += f", {total_slots / data.num_tokens:.2f} epochs of {data.num_tokens:,} tokens"
    lines = [
        f"model     {config.model.name or 'NeoBERT'}: {model.num_hidden_layers} layers x {model.hidden_size}, "
        f"{model.num_attention_heads} heads, {total:,} parameters ({total - embeddings:,} without the vocabulary)",
        f"          at most {flops / 1e6:,.1f} MFLOP a token forward and backward (documents of {length} tokens)",
        describe_compute(
            config,
            run.runtime,
            run.attention.describe(),
            *([f"loss kernel {kernel}"] if objective.predicts_tokens else []),
        ),
        f"tokens    vocabulary {run.tokenizer.size:,}, embedding rows {model.vocab_size:,}",
        f"batch     {config.trainer.micro_batch_rows} rows x {accumulation} micro-batches x "
        f"{run.runtime.world} process(es) = {run.rows_per_step} rows of {length} = {slots:,} slots a step",
        f"budget    {budget}",
    ]
    if (name := name_without_peak(run.runtime.device)) is not None:
        lines.append(f"mfu       unknown: no peak of {name} is in neobert/model/peak.py")
    if batch.warmup_steps:
        lines.append(
            f"warm-up   of the batch from {batch.start_rows} rows to {batch.rows} at step {batch.warmup_steps:,}, "
            f"{batch.unit} at a time"
        )
    if masks.clm_steps is not None:
        lines.append(f"clm       the first {masks.clm_steps:,} steps predict next tokens, the others hidden ones")
    if masks.mask_weights == "adaptive":
        lines.append(
            f"masks     the worse a token is predicted, the likelier; weights for {masks.mask_weights_steps:,} steps"
        )
    lines += [f"data      {note}" for note in data.notes]
    if objective.describe_baseline is not None and run.runtime.is_main:  # It reads data, and only rank 0 speaks.
        lines.append(objective.describe_baseline(config, data.unigram_entropy))
    run.reporter.say("\n".join(lines))
    odd = [*warnings(config, total_steps=run.num_steps), *slow_reading(config, run.runtime.device.type)]
    for text in [*odd, *data.inventory.warnings()]:
        run.reporter.warn(text)
    write_config(config, run.runtime, run.output_dir, run.reporter)


def _choose_largest_rate(masks: DatacollatorSection, objective: Objective) -> float:
    """The largest fraction of the tokens that go through the vocabulary projection in a step."""
    if objective.is_causal or masks.clm_steps is not None:
        return 1.0
    if masks.mlm_rate != "fixed":
        return masks.mlm_rate_range[1]
    return max(masks.mlm_probability, masks.mlm_probability_final or 0.0)


def slow_reading(config: Config, device_type: str) -> list[str]:
    """Settings of `dataset` that make a GPU wait, where they were set; they are kept."""
    data = config.dataset
    found: list[str] = []
    if device_type != "cuda":
        return found
    if data.num_workers == 0:
        found.append("dataset.num_workers: 0 makes batches in the training thread, and the GPU waits; write null")
    if data.prefetch_factor == 1:
        found.append("dataset.prefetch_factor: 1 keeps a single step ready; a slow window stops the GPU; write null")
    if data.pin_memory is False:
        found.append("dataset.pin_memory: false makes the GPU wait for every copy of a batch; write null")
    return found


def show_documents(run: Run, model: Model) -> Sequence[Answer]:
    """What `model` says of the first evaluation documents."""
    data = _documents(run)
    if data.eval_set is None:
        return ()
    answers: Answers = load_part(run.objective.answers)
    return answers.show(model, data.eval_set.documents(), num_texts=NUM_TEXTS, top_k=SHOWN)


def pretraining_commands(run: Run) -> list[str]:
    """What to type after pretraining."""
    answers: Answers = load_part(run.objective.answers)
    return [
        f'neobert predict {shlex.quote(str(run.output_dir))} "{answers.example}"',
        f"neobert {run.objective.command} {shlex.quote(str(run.output_dir / 'config.yaml'))} "
        f"--trainer.resume_from_checkpoint latest --trainer.max_steps {2 * run.num_steps}",
    ]


PRETRAINING = Job(announce=announce, evaluate=evaluate, show=show_documents, next_commands=pretraining_commands)
