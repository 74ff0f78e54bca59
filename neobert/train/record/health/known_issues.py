"""Known issues of trainers for language models, as their guides list them, and what happens here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownIssue:
    """One row of such a list."""

    issue: str
    here: str
    """What detects or prevents it, and what to do."""

    tests: tuple[str, ...]
    """`file::test` below tests/, each of which shows it."""


KNOWN_ISSUES = (
    KnownIssue(
        issue="out of memory in training",
        here="the run ends with the shape, the peak and the keys to change: trainer.per_device_train_batch_size (or "
        "auto), trainer.gradient_checkpointing, dataset.max_seq_length",
        tests=(
            "train/test_numerics.py::test_out_of_memory_names_shape_peak_and_keys_and_the_resume_is_identical",
            "train/test_health.py::test_each_check_finds_its_planted_fault",
        ),
    ),
    KnownIssue(
        issue="packed rows with scaled dot product attention in bf16 have a loss of 0",
        here="borders of documents are part of every backend, and no query is without a key; check `loss_near_zero` "
        "would see it",
        tests=(
            "model/test_segment_borders.py",
            "train/test_health.py::test_each_check_finds_its_planted_fault",
        ),
    ),
    KnownIssue(
        issue="labels are masked wrongly",
        here="check `masks_off`; `neobert replay RUN --row N` prints a row with every predicted token",
        tests=(
            "train/test_health.py::test_a_run_whose_batches_are_masked_everywhere_says_so",
            "train/test_inspection.py::test_a_replayed_row_is_the_row_that_was_trained_on",
        ),
    ),
    KnownIssue(
        issue="the loss is NaN",
        here="the step is skipped on every process and its rows are named; trainer.max_bad_steps of them stop the run "
        "before anything is saved; records without text are skipped and counted",
        tests=(
            "train/test_numerics.py::test_a_step_with_a_bad_number_is_skipped_and_nothing_else_is",
            "train/test_numerics.py::test_too_many_in_a_row_stop_the_run_and_save_nothing",
        ),
    ),
    KnownIssue(
        issue="a tokenizer without padding or mask token, infinite loss",
        here="an error before the first step that names the token and tokenizer.allow_special_token_rewrite",
        tests=("data/test_tokenizer.py", "data/test_tokenizer_file.py"),
    ),
    KnownIssue(
        issue="a sharded save hangs",
        here="a rank that is missing is noticed by its heartbeat and the others end with exit code 69 and its name; "
        "checkpoints hold whole weights, whatever trainer.parallel is",
        tests=(
            "train/test_heartbeat.py",
            "train/test_kill_points.py::test_one_of_two_ranks_killed_in_the_middle_of_a_save",
        ),
    ),
    KnownIssue(
        issue="recomputed activations differ from those saved (reentrant checkpointing)",
        here="trainer.gradient_checkpointing recomputes without reentrance, with the same losses; DeepSpeed is refused",
        tests=("train/test_free_keys.py", "train/test_launcher.py"),
    ),
    KnownIssue(
        issue="the loss is flat or rises from step 1",
        here="checks `flat_loss` and `unigram_plateau`",
        tests=(
            "train/test_health.py::test_each_check_finds_its_planted_fault",
            "train/test_health.py::test_a_rate_a_hundred_times_too_high_is_noticed",
        ),
    ),
    KnownIssue(
        issue="the loss goes to 0 quickly",
        here="check `loss_near_zero`",
        tests=("train/test_health.py::test_each_check_finds_its_planted_fault",),
    ),
    KnownIssue(
        issue="the held-out loss rises while that of training falls",
        here="check `held_out_diverging`; trainer.save_best keeps the best checkpoint",
        tests=("train/test_health.py::test_each_check_finds_its_planted_fault",),
    ),
    KnownIssue(
        issue="the gradient norm is 0, or spikes above 100",
        here="checks `gradient_zero` and `gradient_large`",
        tests=("train/test_health.py::test_each_check_finds_its_planted_fault",),
    ),
    KnownIssue(
        issue="the learning rate is flat or NaN",
        here="check `rate_off_curve`; a schedule that cannot be is an error of the config",
        tests=(
            "train/test_health.py::test_each_check_finds_its_planted_fault",
            "config/test_validate_schedule.py",
        ),
    ),
    KnownIssue(
        issue="a chat template is missing",
        here="cannot happen: documents are text, and nothing here reads conversations",
        tests=(),
    ),
)
