"""Commands that train, and that make ready what training reads. Libraries are imported after the arguments are read."""

import inspect
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from neobert import cli
from neobert.commands.flags import build_parser, count, count_or_zero, shard
from neobert.config.dial import set_depth
from neobert.config.load import config_to_yaml, load_config, split_arguments
from neobert.config.migrate import MigrationError, migrate
from neobert.config.reference import build_help
from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.config.schema_data import DatasetSection
from neobert.config.shipped import SHIPPED, copy_shipped
from neobert.config.source import YamlError, read_yaml_text
from neobert.errors import CallError, DataError
from neobert.secrets import scrub


def pretrain(program: str, argv: list[str]) -> int:
    """Pretrain an encoder: `neobert pretrain CONFIG [--section.key value ...]`.

    neobert pretrain dial --depth 4    a model of four layers, with all that follows from it (docs/recipes.md)
    """
    config = parse_command_line(argv, description=pretrain.__doc__, program=program)
    from neobert.train.loop import pretrain as train

    return cli.EXIT_CODES[train(config).reason]


def preprocess(program: str, argv: list[str]) -> None:
    """Tokenise the data of a config once: `neobert preprocess CONFIG [--section.key value ...] [--report] [--debug]`.

    --report  measure lengths, unknown tokens and duplicates of what was written
    --debug   write nothing; print the first rows of the run as text, with the measured mix of masks
    """
    typed = [argument for argument in argv if argument not in ("--debug", "--report")]
    config = parse_command_line(typed, description=preprocess.__doc__, program=program)
    if config.task != "pretraining":
        raise DataError(f"task: {config.task} is for neobert preprocess-pairs (scripts/{config.task}/preprocess.py)")
    from neobert.commands.preprocess import choose_config_name, prepare, preview, write_command
    from neobert.data.store.report import write_report

    if "--debug" in argv:
        cli.print_result(preview(config))
        return
    prepared, overrides = prepare(config, choose_config_name(typed))
    for source in prepared:
        for note in source.inventory.notes():
            print(scrub(f"{source.spec.label}: {note}"))
        cli.say(*(f"warning: {text}" for text in source.inventory.warnings()))
        for split, manifest in source.manifests.items():
            print(
                f"{source.folder / split}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens; "
                f"{manifest['bad']} records could not be read, {manifest['skipped']} had no text"
            )
            if "--report" in argv:
                print(write_report(source.folder / split, config.dataset.max_seq_length).text)
    print("train on it with:")
    print(write_command(typed, overrides))


def tokenize_dataset(program: str, argv: list[str]) -> None:
    """Tokenise a dataset once, into a folder that pretraining then reads by index.

    neobert tokenize-dataset --dataset x.jsonl --tokenizer my_tokenizer --output tokenized_data/x
    neobert tokenize-dataset --output tokenized_data/x --report

    A start after an interruption, with the same flags, resumes where it was and gives the same bytes.
    """
    parser = build_parser(program, tokenize_dataset.__doc__)
    parser.add_argument("--dataset", help="hub data set, local file, folder, pattern with *, or python_stdlib")
    parser.add_argument("--split", help="split, or a slice such as train[:1%%]; default: train, or the only one")
    parser.add_argument("--dataset-config", help="configuration of a hub data set, for example 20231101.en")
    parser.add_argument("--tokenizer", help="folder with a tokenizer, or a name on the hub")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; complete, or not there")
    parser.add_argument(
        "--max-length", type=int, help="cut longer documents into pieces of at most this many tokens; default: whole"
    )
    parser.add_argument("--text-column", help="default: text, content, sentence, or the only one with text")
    parser.add_argument("--num-proc", type=int, help="threads that tokenise; default: all cores")
    parser.add_argument("--max-samples", type=int, help="write only the first documents, this many")
    parser.add_argument("--no-special-tokens", action="store_true", help="leave out [CLS] and [SEP]")
    parser.add_argument(
        "--return-special-tokens-mask", action="store_true", help="add a column that is 1 at [CLS] and [SEP]"
    )
    parser.add_argument("--shard", metavar="i/n", type=shard, help="write part i (from 1) of n, on this machine")
    parser.add_argument(
        "--merge", metavar="FOLDER", type=Path, help="write the parts of --output as one folder, as one job would have"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure lengths, unknown tokens and duplicates; alone: of what is in --output",
    )
    args = parser.parse_args(argv)
    from neobert.commands.tokenize_dataset import run_tokenize

    run_tokenize(args)


def train_tokenizer(program: str, argv: list[str]) -> None:
    """Train a tokenizer on any text source and save it to a folder.

    neobert train-tokenizer --input my_text/ --output my_tokenizer --vocab-size 32768
    neobert train-tokenizer --input python_stdlib --output my_tokenizer --algorithm wordpiece
    """
    parser = build_parser(program, train_tokenizer.__doc__)
    parser.add_argument("--input", required=True, help="file, folder, glob, hub data set, or python_stdlib")
    parser.add_argument("--output", required=True, type=Path, help="folder to save to")
    parser.add_argument("--algorithm", choices=["byte_bpe", "wordpiece"], default="byte_bpe")
    parser.add_argument("--vocab-size", type=int, help="default: 32768")
    parser.add_argument("--text-column", help="default: text, content, sentence, or the only one with text")
    parser.add_argument("--documents", type=int, help="read only the first documents, this many")
    args = parser.parse_args(argv)
    if args.output.exists() and not args.output.is_dir():
        raise DataError(f"--output: {args.output} is not a folder; choose another name")
    if (args.output / "tokenizer.json").exists():
        raise DataError(f"--output: {args.output} holds a tokenizer already; choose another folder, or remove that one")
    from neobert.data.source.spec import describe_source
    from neobert.data.store.opening import open_training_texts
    from neobert.data.tokenizer import train_tokenizer as train

    source = describe_source(args.input, text_column=args.text_column)
    training = open_training_texts([source], DatasetSection(), args.documents)
    tokenizer = train(training.texts, args.algorithm, args.vocab_size)
    tokenizer.save(args.output)
    print(f"{tokenizer.size:,} tokens ({tokenizer.model_name}) saved to {args.output}/; use it as tokenizer.path")


def longer_seq(program: str, argv: list[str]) -> int:
    """Continue a run at a longer context, on documents that are long enough for it.

    neobert longer-seq run.yaml --checkpoint outputs/run --max-length 4096 --trainer.max_steps 12000
    """
    parser = build_parser(
        program,
        longer_seq.__doc__,
        usage="%(prog)s CONFIG.yaml [--section.key VALUE ...] --checkpoint RUN --max-length N [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run folder (its newest) or one checkpoint")
    parser.add_argument(
        "--max-length",
        required=True,
        type=int,
        action="append",
        help="new row length in tokens; passed several times, one subset each, and the run takes the longest",
    )
    parser.add_argument("--min-length", type=int, help="tokens of the shortest document kept; default: half the length")
    parser.add_argument("--rope-theta", type=float, help="base of the rotary frequencies; default: as the config says")
    parser.add_argument("--output", type=Path, help="folder of the subsets; default: tokenized_data/<config>-long")
    parser.add_argument("--prepare-only", action="store_true", help="write the subsets and the commands, then stop")
    args, typed = parser.parse_known_args(argv)
    config = parse_command_line(typed, description=longer_seq.__doc__, program=program)
    from neobert.commands.longer_seq import run_longer

    return run_longer(config, args, typed)


def adapt(program: str, argv: list[str]) -> int:
    """Adapt an encoder to a domain or a language: new tokens from own text, then training on it.

    neobert adapt outputs/run --text my_text.jsonl --general general_text/ --output outputs/adapted

    The folder that is written has the extended model, two runs (the rows of tokens first, then everything) and a table
    with the loss and the tokens a word of own and general text, before and after. Type the same command again when it
    was interrupted.
    """
    parser = build_parser(
        program,
        adapt.__doc__,
        allow_abbrev=False,
        epilog="After these, settings as for pretrain: --section.key value.",
    )
    parser.add_argument("model", help="run folder, checkpoint, exported folder, or a name of the hub")
    source = "file, folder, glob or hub data set; may be repeated"
    parser.add_argument("--text", required=True, action="append", help=f"own text: {source}")
    parser.add_argument(
        "--general", action="append", help=f"text like that of its training, against forgetting: {source}"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--text-column", help="default: text, content, sentence, or the only one with text")
    parser.add_argument("--new-tokens", type=count, help="default 1000; fewer where the text has no more")
    parser.add_argument(
        "--documents", type=count, help="learn them from so many documents of each own text; default: all"
    )
    parser.add_argument("--init", help="how their rows start: fvt (default), nearest, mean or random")
    parser.add_argument("--general-fraction", type=float, help="of the tokens that are trained on (default 0.5)")
    parser.add_argument("--general-documents", type=count, help="use the first documents only, this many; default: all")
    parser.add_argument("--held-out", type=count, help="documents of an own text to measure on (default 100)")
    parser.add_argument("--general-held-out", type=count, help="the same of a general text (default 100)")
    parser.add_argument("--seed", type=count_or_zero, help="of rows, masks and new rows (default 0)")
    parser.add_argument(
        "--config", default="continue", help="config of the training (default: the shipped %(default)s)"
    )
    parser.add_argument(
        "--embedding-steps", type=count_or_zero, default=100, help="steps that train rows of tokens only (default 100)"
    )
    parser.add_argument("--probe-sets", nargs="+", default=[], help="files of labelled texts, as trainer.probe_sets")
    parser.add_argument("--piece-chars", type=count, default=1000, help="as of mlm-loss --whole-words (default 1000)")
    args, typed = parser.parse_known_args(argv)
    if others := split_arguments(typed)[1]:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    load_config(args.config, ["dataset.path=<text>", "model.init_from=<model>", *typed])  # A wrong key is said at once.
    from neobert.commands.adapt import AdaptRequest, AdaptTraining, run_adapt

    values = cli.explicit_values(args, AdaptRequest)
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return run_adapt(
        AdaptRequest(**values),
        AdaptTraining(config=args.config, overrides=tuple(typed), embedding_steps=args.embedding_steps),
        args.output,
        probe_sets=args.probe_sets,
        piece_chars=args.piece_chars,
    )


def finetune(program: str, argv: list[str]) -> int:
    """Fine-tune an encoder on labels or on pairs, by the config's task: `neobert finetune CONFIG [--key value ...]`."""
    config = parse_command_line(argv, description=finetune.__doc__, program=program)
    if config.task == "finetune":
        return _finetune_on_labels(config)
    from neobert.contrastive.finetune import finetune as train
    from neobert.contrastive.pair_data import NotPrepared
    from neobert.contrastive.prepare_sets import preprocess_command

    try:
        return cli.EXIT_CODES[train(config).reason]
    except NotPrepared as error:
        raise NotPrepared(f"{error}; prepare the sets first:\n  {preprocess_command(argv)}") from error


def _finetune_on_labels(config: Config) -> int:
    from neobert.finetune.job import finetune as train
    from neobert.finetune.several_seeds import finetune_seeds

    if not config.finetune.seeds:
        return cli.EXIT_CODES[train(config).reason]
    found = finetune_seeds(config)
    if found.results and found.metrics:
        cli.print_result(found.describe())
    return cli.EXIT_CODES[found.reason]


def preprocess_pairs(program: str, argv: list[str]) -> None:
    """Prepare the sets of a contrastive config: `neobert preprocess-pairs CONFIG [--section.key value ...]`.

    `dataset.name` (or `contrastive.sets`) says which: a known set, a dataset of the hub, a local file or folder, ALL.
    --shard i/n  of n machines, this one is i: it reads its part of the files; the last one joins the parts
    """
    parser = build_parser(program, None, add_help=False, allow_abbrev=False)
    parser.add_argument("--shard", type=shard)
    args, typed = parser.parse_known_args(argv)
    config = parse_command_line(typed, description=preprocess_pairs.__doc__, program=program)
    if config.task != "contrastive":
        raise DataError(f"task: {config.task} is for neobert preprocess (scripts/{config.task}/preprocess.py)")
    from neobert.contrastive.examples import FORM_NAMES
    from neobert.contrastive.prepare_sets import prepare, say_found
    from neobert.contrastive.set_folder import sets_folder
    from neobert.contrastive.set_parts import PreparedSet, prepare_part

    if args.shard is None:
        folder = sets_folder(str(config.dataset.path))
        done = [
            PreparedSet(folder=folder / info.key, info=info, note="written" if fresh else "there already")
            for info, fresh in prepare(config, report=say_found)
        ]
    else:
        done = prepare_part(config, args.shard, report=say_found)
    for item in done:
        if item.info is None:
            print(f"{item.folder}: {item.note}")
            continue
        negatives = f", up to {item.info.max_negatives} negatives" if item.info.max_negatives else ""
        print(f"{item.folder}: {item.info.num_rows:,} {FORM_NAMES[item.info.form]}{negatives} ({item.note})")
    print("train on it with:")
    print(shlex.join(["neobert", "finetune", *typed]))


def pipeline(program: str, argv: list[str]) -> int:
    """Run a list of stages, each from what the one before it made: `neobert pipeline FILE [overrides]`.

    Finished stages are skipped, one that was interrupted resumes. Overrides are laid over every stage with a config.
    """
    parser = build_parser(program, pipeline.__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="YAML with output and stages")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    args, overrides = parser.parse_known_args(argv)
    from neobert.commands.staged_run import load_pipeline, run_pipeline

    return run_pipeline(load_pipeline(args.file, overrides), dry_run=args.dry_run)


def config(program: str, argv: list[str]) -> None:
    """List the shipped configs, or copy one out to change it: `neobert config list`, `neobert config copy NAME [DEST]`.

    Every command takes a shipped config by its name: `neobert pretrain quickstart`.
    """
    parser = build_parser(program, config.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="every shipped config with its first comment")
    action = actions.add_parser("copy", help="write a copy of a shipped config")
    action.add_argument("name", help="as in the list")
    action.add_argument("dest", nargs="?", type=Path, help="file or folder; default: NAME.yaml here")
    args = parser.parse_args(argv)
    if args.action == "list":
        width = max(map(len, SHIPPED))
        cli.print_result("\n".join(f"{x:<{width}}  {_describe_shipped(SHIPPED[x], 118 - width)}" for x in SHIPPED))
    else:
        print(f"{args.name} copied to {copy_shipped(args.name, args.dest)}")


def _describe_shipped(file: Path, width: int) -> str:
    comments = [line.removeprefix("#") for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    return textwrap.shorten(" ".join(comments), width, placeholder=" ...")


def migrate_config(program: str, argv: list[str]) -> None:
    """Rewrite a config of other NeoBERT code for this one: `neobert migrate-config OLD.yaml > new.yaml`.

    The new file goes to stdout, the list of edits to stderr.
    """
    parser = build_parser(program, migrate_config.__doc__)
    parser.add_argument("file", type=Path, metavar="OLD.yaml", help="the config to rewrite")
    file = parser.parse_args(argv).file
    try:
        text, edits = migrate(read_yaml_text(file))
    except (MigrationError, YamlError) as error:
        raise type(error)(f"{file}: {error}") from error
    cli.print_result(text, end="")
    cli.say(f"{len(edits)} edits:", *(f"  - {edit}" for edit in edits))


def parse_command_line(argv: Sequence[str], *, description: str | None, program: str) -> Config:
    """The config that `argv` describes.

    `--help` and `--print-config` print to stdout and exit with 0; nothing but the config file is read for them.
    Warnings of `--print-config` go to stderr.

    Args:
        argv: a config file, or the name of a shipped one, and overrides.
        description: the docstring of the command, for `--help`.
        program: what was typed before the arguments.

    Raises:
        CallError: there is no config file, or more than one, or an unknown option.
        ConfigError: the file or an override is wrong; all problems in one message.
    """
    usage = f"usage: {program} CONFIG.yaml [--section.key VALUE ...]"
    if any(argument in ("--help", "-h") for argument in argv):
        cli.print_result(build_help(usage, inspect.cleandoc(description or "")))
        raise SystemExit(0)
    rest = [argument for argument in argv if argument != "--print-config"]
    overrides, others = split_arguments(rest)
    path = _choose_file(others, usage)
    typed = [f"--{key}" if text is None else f"--{key}={text}" for key, text in overrides]
    config = load_config(path, set_depth(path, typed))
    if len(rest) < len(argv):
        cli.say(*(f"warning: {warning}" for warning in warnings(config)))
        cli.print_result(config_to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _choose_file(others: Sequence[str], usage: str) -> str:
    options = [argument for argument in others if argument.startswith("-")]
    if options:
        raise CallError(f"unknown option {options[0]}; --help lists all keys\n{usage}")
    if len(others) > 1:
        raise CallError(f"one config file is expected, got {len(others)}: {', '.join(others)}\n{usage}")
    if not others:
        raise CallError(f"no config file; write a file, or a name that `neobert config list` has\n{usage}")
    return others[0]
