"""A run continues at a longer context, on the documents that are long enough for it.

1. Of the training documents, those with at least `--min-length` tokens (half of the new length unless set) are
   written to a folder of their own, in source order. The evaluation split, where there is one, is kept whole, so that
   its loss compares with the one before.
2. The run continues from the checkpoint: its weights, its optimizer and its step, with another order of rows, in
   another output folder. This is `pretrain` with the overrides of `longer_overrides`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from neobert.cli import EXIT_CODES
from neobert.commands.preprocess import choose_config_name, write_command
from neobert.config.load import config_to_yaml, load_saved_config, parse_config
from neobert.config.schema import Config
from neobert.data.pipeline import build_tokenizer
from neobert.data.store.offline import PreparedSource, data_overrides, name_tokenizer, prepare_sources
from neobert.data.tokenizer import limit_threads
from neobert.errors import StartupError
from neobert.train.loop import pretrain
from neobert.train.start import read_train_state
from neobert.weights.folder import CheckpointError, choose_checkpoint


def run_longer(config: Config, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Writes the subsets, prints the commands and trains; returns the exit code.

    Args:
        args: what is asked for beside the config.
        argv: the config file and its overrides, as they were typed.
    """
    lengths = sorted(set(args.max_length))
    checkpoint = find_start(args.checkpoint)
    check_longer(config, checkpoint, lengths, args.min_length, args.rope_theta)
    output = args.output or Path("tokenized_data") / f"{choose_config_name(argv)}-long"
    subsets = write_subsets(config, checkpoint, output, lengths, args.min_length)
    commands = {
        length: longer_overrides(
            config,
            load_saved_config(checkpoint / "config.yaml"),
            checkpoint=checkpoint,
            subset=subset,
            max_length=length,
            rope_theta=args.rope_theta,
        )
        for length, subset in subsets.items()
    }
    for length, overrides in commands.items():
        print(f"continue at {length} tokens with:")
        print(write_command(argv, overrides))
    if args.prepare_only:
        return 0
    result = pretrain(parse_config(config_to_yaml(config), commands[lengths[-1]]))
    return EXIT_CODES[result.reason]


def find_start(path: Path) -> Path:
    """The checkpoint that `--checkpoint` means: a checkpoint folder, or the newest valid one of a run.

    Raises:
        StartupError: there is none.
    """
    try:
        found = choose_checkpoint(path).path
    except CheckpointError as error:
        raise StartupError(f"--checkpoint: {error}") from error
    if found is None:
        raise StartupError(f"--checkpoint: {path} is neither a checkpoint nor a run folder that has one")
    return found


def check_longer(
    config: Config, checkpoint: Path, lengths: Sequence[int], min_length: int | None, rope_theta: float | None
) -> None:
    """Raises for what cannot work, before any document is read.

    Raises:
        StartupError: naming the flag or key and the remedy.
    """
    old = load_saved_config(checkpoint / "config.yaml")
    if lengths[0] <= old.dataset.max_seq_length:
        raise StartupError(
            f"--max-length: {lengths[0]} is not longer than the checkpoint's dataset.max_seq_length = "
            f"{old.dataset.max_seq_length}; to continue at the same length, resume with pretrain.py"
        )
    if not old.model.rope:
        raise StartupError(
            "model.rope: false: learned positions end where the training ended; only rotary ones can be extended"
        )
    if rope_theta is not None and rope_theta <= 0:
        raise StartupError(f"--rope-theta: {rope_theta} must be greater than 0")
    if min_length is not None and min_length < 1:
        raise StartupError(f"--min-length: {min_length} must be at least 1")
    step, budget = read_train_state(checkpoint)["step"], config.trainer.max_steps
    if budget is not None and budget <= step:
        raise StartupError(
            f"trainer.max_steps: {budget} is spent, the checkpoint is at step {step}; add the steps at the longer "
            f"length, for example --trainer.max_steps {step + max(1, step // 10)}"
        )


def write_subsets(
    config: Config, checkpoint: Path, output: Path, lengths: Sequence[int], min_length: int | None
) -> dict[int, list[PreparedSource]]:
    """The long documents for each length, in `output/<length>`; `lengths` ascending.

    With several lengths text is tokenised for the shortest only: the longer documents are among those.

    Raises:
        DataError: a source cannot be used, or has no document that is long enough.
    """
    limit_threads(config.dataset.num_proc)
    tokenizer = build_tokenizer(config, checkpoint, output)
    subsets: dict[int, list[PreparedSource]] = {}
    section = config.dataset
    for length in lengths:
        least = min_length if min_length is not None else length // 2
        subsets[length] = prepare_sources(
            section,
            tokenizer,
            output / str(length),
            tokenizer_name=name_tokenizer(config.tokenizer),
            min_tokens=least,
        )
        for source in subsets[length]:
            manifest = source.manifests[source.train_split]
            print(
                f"{source.folder}: {manifest['num_documents']:,} documents with at least {least:,} tokens, "
                f"{manifest['num_tokens']:,} tokens; {manifest['short']:,} shorter ones left out"
            )
        overrides = data_overrides(subsets[length], section)
        section = parse_config(config_to_yaml(config), overrides).dataset
    return subsets


def longer_overrides(
    config: Config,
    old: Config,
    *,
    checkpoint: Path,
    subset: Sequence[PreparedSource],
    max_length: int,
    rope_theta: float | None,
) -> list[str]:
    """What makes `config` continue `checkpoint` (a run of `old`) on `subset` with rows of `max_length`.

    The output folder is the one of `config`, with the length after its name where that is the checkpoint's own.
    """
    output_dir = Path(config.trainer.output_dir)
    if output_dir.resolve() in checkpoint.resolve().parents:
        output_dir = output_dir.with_name(f"{output_dir.name}-{max_length}")
    positions = max(max_length, config.model.max_position_embeddings)
    theta = config.model.rope_theta if rope_theta is None else rope_theta
    changed = {
        "dataset.max_seq_length": (old.dataset.max_seq_length, max_length),
        "model.max_position_embeddings": (old.model.max_position_embeddings, positions),
        "model.rope_theta": (old.model.rope_theta, theta),
    }
    allow = [key for key, (before, now) in changed.items() if before != now]
    overrides = [
        f"trainer.resume_from_checkpoint={checkpoint}",
        f"trainer.output_dir={output_dir}",
        *data_overrides(subset, config.dataset),
        *(f"{key}={now}" for key, (_, now) in changed.items()),
        f"trainer.resume_allow=[{','.join(allow)}]",
    ]
    if config.tokenizer.max_length is not None:
        overrides.append(f"tokenizer.max_length={max_length}")
    if config.datacollator.max_length is not None:
        overrides.append(f"datacollator.max_length={max_length}")
    return overrides
