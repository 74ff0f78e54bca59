"""The data of a run before it trains: tokenised once, or its first rows shown as text.

Rows are shown through the run's own loader. Text is read as a stream, whatever `dataset.streaming` says, so that
nothing has to be tokenised first; what cannot be streamed is tokenised into a temporary folder.
"""

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from neobert import cli
from neobert.config.load import split_arguments
from neobert.config.schema import Config
from neobert.data.pipeline import Reader, build_tokenizer
from neobert.data.store.offline import PreparedSource, data_overrides, name_tokenizer, prepare_sources
from neobert.data.tokenizer import Tokenizer, limit_threads
from neobert.objectives.mlm import describe_rate
from neobert.objectives.table import choose_objective
from neobert.secrets import hide_credentials, scrub
from neobert.train.build import build_config_data, choose_rows_per_step
from neobert.train.hardware.micro_batch import shared_rows
from neobert.types import IGNORE_INDEX, PackedBatch


def prepare(config: Config, config_name: str) -> tuple[list[PreparedSource], list[str]]:
    """Tokenises what the run of this config would read, and gives the overrides with which it reads that.

    Raises:
        DataError: a source or the tokenizer cannot be used as configured.
    """
    output, config = choose_output(config, config_name)
    limit_threads(config.dataset.num_proc)
    tokenizer = build_tokenizer(config, None, output)
    if tokenizer.note is not None:
        cli.say(f"warning: {tokenizer.note}")
    trained = config.tokenizer.train
    name = "trained" if trained else name_tokenizer(config.tokenizer)
    prepared = prepare_sources(config.dataset, tokenizer, output, tokenizer_name=name)
    overrides = data_overrides(prepared, config.dataset)
    if trained:
        overrides += ["tokenizer.train=false", f"tokenizer.path={output / 'tokenizer'}"]
        overrides += [f"tokenizer.{key}=null" for key in ("vocab_size", "train_documents")]
    return prepared, overrides


def choose_output(config: Config, config_name: str) -> tuple[Path, Config]:
    """Where the tokens go, and the config of what is tokenised.

    `dataset.pre_tokenize_output`, else `dataset.path` where `dataset.name` is the source and nothing else is at that
    path, else `tokenized_data/<name of the config file>`.
    """
    section = config.dataset
    if isinstance(section.path, str) and section.name is not None and _is_free(Path(section.path)):
        source = replace(config, dataset=replace(section, path=None))
        return Path(section.pre_tokenize_output or section.path), source
    return Path(section.pre_tokenize_output or f"tokenized_data/{config_name}"), config


def write_command(argv: Sequence[str], overrides: Sequence[str]) -> str:
    """The line that trains with a command line's `argv` and more overrides, `key=value` each."""
    pairs = [part for override in overrides for part in ("--" + override).split("=", maxsplit=1)]
    return shlex.join(["neobert", "pretrain", *map(hide_credentials, [*argv, *pairs])])


def choose_config_name(argv: Sequence[str]) -> str:
    """The config file of a command line, without folder and ending."""
    return Path(split_arguments(argv)[1][0]).stem


def _is_free(path: Path) -> bool:
    """Nothing is there, or what this command has written, finished or not."""
    if "://" in str(path) or "*" in str(path):
        return False
    return not path.exists() or any(
        next(path.glob(pattern), None)
        for pattern in (".tmp-*/progress.json", "*/manifest.json", "tokenizer/trained_from.txt")
    )


NUM_ROWS = 3


def preview(config: Config) -> str:
    """The first rows and the measured mix of masks of the first step, as text. Writes nothing that stays.

    Raises:
        DataError: data or tokenizer cannot be used as configured.
        StartupError: the batch cannot be built as configured.
    """
    section = replace(config.dataset, pre_tokenize=False, num_workers=0, num_proc=None, eval_split=None)
    # The first step alone has no use for the length of the run, which a stream may not know.
    masks = replace(config.datacollator, mlm_probability_final=None, mlm_probability_final_step=None)
    config = replace(config, dataset=replace(section, streaming=section.streaming or None), datacollator=masks)
    rows_per_step = choose_rows_per_step(config, world=1)
    if config.trainer.per_device_train_batch_size == "auto":  # The rows of a step do not depend on the choice.
        rows = shared_rows(config, rows_per_step)
        config = replace(config, trainer=replace(config.trainer, per_device_train_batch_size=rows))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(config, None, Path(folder))
        reader = Reader(rows_per_step=rows_per_step, prepared_dir=Path(folder) / "tokenized")
        data = build_config_data(config, tokenizer, reader)
        loader = data.loader()
        try:
            step = next(loader)
        finally:
            loader.close()
    batches = [batch for batch in step.micro_batches if isinstance(batch, PackedBatch)]
    lines = [*([] if tokenizer.note is None else [tokenizer.note]), *map(scrub, data.notes)]
    lines += [*(f"warning: {text}" for text in data.inventory.warnings()), *data.inventory.table()]
    lines += describe_rows(batches[0], tokenizer, kept=choose_objective(config).predicts_tokens)
    return "\n".join([*lines, *describe_mix(batches, config, tokenizer)])


def describe_rows(
    batch: PackedBatch, tokenizer: Tokenizer, num_rows: int = NUM_ROWS, *, kept: bool = True
) -> Iterator[str]:
    """The documents of the first rows as they are fed, and what is to be predicted in each. `kept`: also targets that
    are fed as they are."""
    width = batch.input_ids.shape[1]
    shown = batch.targets != IGNORE_INDEX
    if not kept:
        shown &= batch.input_ids.flatten()[batch.masked_index] != batch.targets
    targets = dict(zip(batch.masked_index[shown].tolist(), batch.targets[shown].tolist()))
    for row in range(min(num_rows, len(batch.input_ids))):
        tokens, segments = batch.input_ids[row].numpy(), batch.segments.ids[row].numpy()
        count = int(segments.max())
        yield f"row {row}: {count} documents in {int((segments > 0).sum())} of {width} slots"
        for number in range(1, count + 1):
            slots = np.flatnonzero(segments == number)
            yield f"  document {number}, slots {slots[0]} to {slots[-1]}: {tokenizer.decode(tokens[slots].tolist())}"
            for slot in slots.tolist() if not batch.segments.causal else ():
                if (target := targets.get(row * width + slot)) is not None:
                    fed, expected = int(tokens[slot]), tokenizer.decode_token(target)
                    yield f"    slot {slot}: predict {expected!r} from {_describe_fed(fed, target, tokenizer)}"


def _describe_fed(fed: int, target: int, tokenizer: Tokenizer) -> str:
    if fed == tokenizer.mask_id:
        return tokenizer.decode_token(fed)
    return "itself, kept" if fed == target else f"random {tokenizer.decode_token(fed)!r}"


def choose_mix(config: Config) -> tuple[float, float, float]:
    """Fractions of the predicted tokens that become [MASK], a random token, or stay."""
    masks = config.datacollator
    if masks.mask_all:
        return 1.0, 0.0, 0.0
    return masks.mask_fraction, masks.random_fraction, max(0.0, 1 - masks.mask_fraction - masks.random_fraction)


def describe_mix(batches: Sequence[PackedBatch], config: Config, tokenizer: Tokenizer) -> list[str]:
    """Fractions of what replaces predicted tokens, and the fraction of tokens that are predicted."""
    if batches[0].segments.causal:
        return [f"predicted: {sum(b.num_targets for b in batches):,} tokens of the first step, each from those before"]
    num_masked = num_kept = num_predicted = num_ordinary = 0
    for batch in batches:
        kept = (batch.targets != IGNORE_INDEX).numpy()
        slots, targets = batch.masked_index.numpy()[kept], batch.targets.numpy()[kept]
        fed = batch.input_ids.numpy().reshape(-1).copy()
        num_masked += int((fed[slots] == tokenizer.mask_id).sum())
        num_kept += int((fed[slots] == targets).sum())
        num_predicted += len(slots)
        fed[slots] = targets
        real = batch.segments.ids.numpy().reshape(-1) > 0
        num_ordinary += int((~np.isin(fed[real], tokenizer.special_ids)).sum())
    p, total = config.datacollator.mlm_probability, max(1, num_predicted)
    if not choose_objective(config).predicts_tokens:
        num_replaced = num_predicted - num_kept
        return [
            f"replaced: {num_replaced:,} of {num_ordinary:,} ordinary tokens of the first step = "
            f"{num_replaced / max(1, num_ordinary):.2%} (datacollator.mlm_probability: {p:.2%})"
        ]
    masks = config.datacollator
    rate = f"datacollator.mlm_probability: {p:.2%}" if masks.mlm_rate == "fixed" else f"each row {describe_rate(masks)}"
    mix = ", ".join(f"{fraction:.0%}" for fraction in choose_mix(config))
    return [
        f"predicted: {num_predicted:,} of {num_ordinary:,} ordinary tokens of the first step = "
        f"{num_predicted / max(1, num_ordinary):.2%} ({rate})",
        f"of these [MASK] {num_masked / total:.1%}, random {(num_predicted - num_masked - num_kept) / total:.1%}, "
        f"kept {num_kept / total:.1%} (configured: {mix})",
    ]
