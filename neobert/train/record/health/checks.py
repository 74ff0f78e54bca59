"""The checks of a run: what each looks at, its threshold, one line of advice.

The tables of docs/troubleshooting.md are made from it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from neobert.train.record.health.findings import (
    Expected,
    find_data_wait,
    find_dead_heads,
    find_divergence,
    find_embedding_drift,
    find_falling_speed,
    find_flat_loss,
    find_large_gradient,
    find_large_logits,
    find_loss_near_zero,
    find_odd_masks,
    find_odd_rate,
    find_padding,
    find_plateau,
    find_starving_source,
    find_swap,
    find_zero_gradient,
)
from neobert.train.report.log_reader import RunLog

Find = Callable[[RunLog, Expected], str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthCheck:
    """One thing that is looked at."""

    reads: str
    """What it looks at."""

    threshold: str
    advice: str
    """One line."""

    find: Find
    page: str = "troubleshooting.md#health"
    """Where the docs say more."""


CHECKS: dict[str, HealthCheck] = {
    "flat_loss": HealthCheck(
        reads="loss of the first 10 and the last 50 steps",
        threshold="not 2% lower 100 steps after the warm-up (200 at least); fine-tuning: not lower at half of the "
        "budget; from trained weights: a quarter higher there",
        advice="nothing is learned: look at a row (in pretraining `neobert replay RUN --row 0`), then at optimizer.lr, "
        "up or down",
        find=find_flat_loss,
    ),
    "loss_near_zero": HealthCheck(
        reads="mean loss of the last 20 steps",
        threshold="below 0.05 nats; other objectives: below 0.001 in the first quarter of the budget",
        advice="the answer is in the input, or the data is a few texts again and again: look at a row with "
        "`neobert replay RUN --row 0`",
        find=find_loss_near_zero,
    ),
    "unigram_plateau": HealthCheck(
        reads="loss of the last 50 steps beside the entropy that the run prints at its start",
        threshold="above 98% of the entropy after 20% of the budget (300 steps at least, 5,000 at most) and a tenth of "
        "it (1,000 steps at most) after the warm-up",
        advice="the model has learned which tokens are frequent and nothing else: lower optimizer.lr or raise "
        "scheduler.warmup_steps; small models need some hundred steps",
        find=find_plateau,
    ),
    "gradient_zero": HealthCheck(
        reads="gradient norm of the last 20 steps that have targets",
        threshold="exactly 0 in all of them",
        advice="no weight changes: the weights are zero or frozen, or the loss does not depend on them",
        find=find_zero_gradient,
    ),
    "gradient_large": HealthCheck(
        reads="gradient norm of the last 20 steps, before clipping",
        threshold="above 100 in 5 of them",
        advice="training is unstable: lower optimizer.lr or raise scheduler.warmup_steps; trainer.skip_spikes: 6 skips "
        "single steps",
        find=find_large_gradient,
    ),
    "held_out_diverging": HealthCheck(
        reads="loss and criterion of evaluations, loss of training",
        threshold="three evaluations that rise, each 5% above the lowest, none of a better score, while the loss of "
        "training falls",
        advice="the model learns its data by heart: fewer epochs, more data, or dropout and weight decay; "
        "trainer.save_best: true keeps the best checkpoint",
        find=find_divergence,
    ),
    "rate_off_curve": HealthCheck(
        reads="learning rate of the last 50 steps beside scheduler.*",
        threshold="a relative difference of 1e-6",
        advice="the code that sets the rate is not that of the schedule, or the log was changed",
        find=find_odd_rate,
    ),
    "logits_large": HealthCheck(
        reads="max_attention_logit (optimizers that clip it) and logsumexp/max (trainer.log_statistics)",
        threshold="above 150 and three times optimizer.muon_config.clipping_threshold; above 100; in three log lines",
        advice="attention or the projection is about to become unstable: model.qk_norm: true, trainer.z_loss: 1e-4, or "
        "a lower optimizer.lr",
        find=find_large_logits,
    ),
    "dead_heads": HealthCheck(
        reads="norm of values times norm of output of each head, at evaluations",
        threshold="below 2% of the mean of its layer, in two evaluations",
        advice="these heads cost time and do nothing: less optimizer.weight_decay, or fewer heads",
        find=find_dead_heads,
    ),
    "embedding_drift": HealthCheck(
        reads="norm of the embedding, at evaluations",
        threshold="four times or a quarter of what it was after 10% of the budget (500 steps at least)",
        advice="the embedding grows or shrinks without end: optimizer.weight_decay, or a lower rate for it in "
        "optimizer.groups",
        find=find_embedding_drift,
    ),
    "masks_off": HealthCheck(
        reads="num_targets / num_tokens of the last 20 steps",
        threshold="below half of, or 10% above, datacollator.mlm_probability (its lowest and highest value)",
        advice="masks are not those of the config: look at a row with `neobert replay RUN --row 0`; documents of a few "
        "tokens are special tokens for the most part, raise dataset.min_length",
        find=find_odd_masks,
    ),
    "source_starving": HealthCheck(
        reads="tokens by source of the last 5 log lines and of those before",
        threshold="less than a tenth of its fraction before; or, where sources have weights, none in 500 steps",
        advice="files of this source are left out or empty: look for bad records in events.jsonl, check its path",
        find=find_starving_source,
        page="data.md#sources",
    ),
    "padding": HealthCheck(
        reads="packing_fill of the last 5 log lines",
        threshold="below 85% with full packed rows, below 50% otherwise",
        advice="slots are computed for nothing: raise dataset.window_documents, or lower dataset.max_seq_length, or "
        "set datacollator.pack_sequences: true",
        find=find_padding,
        page="troubleshooting.md#slow",
    ),
    "throughput_falling": HealthCheck(
        reads="tokens per second of the last 5 log lines and of those before, in this start",
        threshold="below half of the median before, for 5 minutes together",
        advice="something else uses the machine, or it is too hot: look at other processes, clocks and temperatures; "
        "trainer.profiler_steps says where the time goes",
        find=find_falling_speed,
        page="training.md#profile",
    ),
    "data_wait": HealthCheck(
        reads="data_wait of the last 3 log lines, in this start",
        threshold="above 20% in each, of 30 seconds together",
        advice="tokenise once (dataset.streaming: false), raise dataset.num_workers, or move the data to a faster disk",
        find=find_data_wait,
        page="troubleshooting.md#slow",
    ),
    "swap": HealthCheck(
        reads="memory of the process that is in swap (Linux)",
        threshold="256 MiB and a tenth of its memory",
        advice="memory is too small: a smaller trainer.per_device_train_batch_size with trainer.global_batch_size set, "
        "fewer dataset.num_workers, or end other programs",
        find=find_swap,
    ),
}
"""By the name that console, `events.jsonl` and report use."""
