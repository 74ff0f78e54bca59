"""Commands that use trained models and their checkpoints. Libraries are imported after the arguments are read."""

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from neobert import cli
from neobert.cli import explicit_values
from neobert.commands.flags import (
    POOLING_HELP,
    add_columns,
    add_input,
    add_json,
    add_limits,
    add_vector_settings,
    build_model_parser,
    build_pairs_parser,
    build_parser,
    print_answer,
)
from neobert.errors import CallError


def predict(program: str, argv: list[str]) -> None:
    """Fill the masks of texts with a trained model: `neobert predict MODEL "The capital of France is [MASK]."`

    A model of replaced-token detection says instead which tokens of a text do not belong, one of causal language
    modelling which tokens come next.

    With --output, of every record of a file: `neobert predict MODEL INPUT --output answers.jsonl`. Type the same
    command again when it was interrupted.
    """
    parser = build_model_parser(program, predict.__doc__)
    parser.add_argument("text", nargs="*", help='text with [MASK], or with --output the input: "The sky is [MASK]."')
    parser.add_argument("--file", help="read texts from a file, one a line; - reads the standard input")
    parser.add_argument("--output", type=Path, help="JSONL file, one line a record of INPUT")
    add_columns(parser)
    parser.add_argument("--chunk-texts", type=int, help="records between two notes of progress (default 256)")
    parser.add_argument("--top-k", type=int, default=5, help="tokens to show for each mask (default 5)")
    parser.add_argument("--joint", action="store_true", help="fill the masks of a text from left to right")
    add_json(parser, "print one JSON object a text")
    args = parser.parse_args(argv)
    if args.output is not None:
        _predict_file(args)
        return
    for flag in ("text_column", "split", "chunk_texts"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: is for files of records; add --output, or leave it out")
    texts = list(args.text)
    if args.file:
        read = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
        texts += [line for line in read.splitlines() if line.strip()]
    if not texts:
        raise ValueError('no text; write one with [MASK] in it, for example "The sky is [MASK].", or --file')
    from neobert.inference.model import load

    model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
    for result in model.predict(texts, top_k=args.top_k, joint=args.joint):
        print_answer(dataclasses.asdict(result), result.describe(), as_json=args.json)


def _predict_file(args: argparse.Namespace) -> None:
    if len(args.text) != 1 or args.file or args.json:
        raise ValueError("--output: name one input, without --file and --json: `MODEL INPUT --output answers.jsonl`")
    from neobert.inference.model import load
    from neobert.inference.predict import PredictSettings, check_lines_output, predict_to_file
    from neobert.inference.texts import open_texts

    settings = PredictSettings(**explicit_values(args, PredictSettings))
    check_lines_output(args.output)
    with open_texts(args.text[0], text_column=args.text_column, split=args.split) as texts:
        model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
        report = predict_to_file(model, texts, args.output, settings)
        cli.say(*texts.notes, *texts.describe_gaps("lines that say so"), report.throughput.describe())
    refused = f"; {report.num_refused:,} texts have no answer, their lines say why" if report.num_refused else ""
    cli.say(f"{report.num_records:,} records answered in {args.output}{refused}")


def embed(program: str, argv: list[str]) -> None:
    """Embed texts with a trained model: `neobert embed MODEL INPUT --output vectors.npy`.

    Type the same command again when it was interrupted: it resumes, and the file is the one of an undisturbed run.
    """
    parser = build_model_parser(program, embed.__doc__)
    add_input(parser)
    parser.add_argument("--output", required=True, type=Path, help="file ending in .npy or .parquet")
    parser.add_argument("--pooling", help=POOLING_HELP)
    parser.add_argument("--normalize", action="store_true", help="scale every vector to length 1")
    parser.add_argument("--batch-tokens", type=int, help="default 8192")
    parser.add_argument("--chunk-texts", type=int, help="default 2048")
    args = parser.parse_args(argv)
    from neobert.inference.embed import EmbedSettings, check_output, embed_to_file
    from neobert.inference.model import load
    from neobert.inference.texts import open_texts

    settings = EmbedSettings(**explicit_values(args, EmbedSettings))
    check_output(args.output)
    with open_texts(args.input, text_column=args.text_column, split=args.split) as texts:
        model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
        report = embed_to_file(model, texts, args.output, settings)
        cli.say(*texts.notes, *texts.describe_gaps("rows of zeros"), report.throughput.describe())
    resumed = f" ({report.num_resumed:,} of them before the interruption)" if report.num_resumed else ""
    cut = f"; {report.num_truncated:,} were longer than the model and were cut" if report.num_truncated else ""
    cli.say(f"{report.num_texts:,} texts of {report.num_records:,} records{resumed} embedded to {args.output}{cut}")


def mlm_loss(program: str, argv: list[str]) -> None:
    """Masked-token loss of a model on any text: `neobert mlm-loss MODEL INPUT`.

    MODEL is a run, a checkpoint, an exported folder, or the name of a masked language model on the hub. The masks are
    those of the evaluation in training. With --whole-words, models with different tokenizers can be compared.
    """
    parser = build_model_parser(program, mlm_loss.__doc__)
    add_input(parser)
    add_limits(parser)
    parser.add_argument("--mlm-probability", type=float, help="default 0.15")
    parser.add_argument("--mask-all", action="store_true", help="always [MASK], instead of 80%% [MASK] and 10%% random")
    parser.add_argument("--eval-seed", dest="seed", type=int, default=0, help="seed of the masks (default 0)")
    parser.add_argument(
        "--truncate", action="store_true", help="score the first --max-length tokens of a document only"
    )
    parser.add_argument("--min-length", type=int, help="default 5 tokens")
    parser.add_argument("--whole-words", action="store_true", help="mask words, and report bits per byte")
    parser.add_argument("--piece-chars", type=int, help="default 1000")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model of others")
    parser.add_argument(
        "--output", type=Path, help="write the metrics here too, as JSON; interrupted, the same command continues"
    )
    args = parser.parse_args(argv)
    from neobert.inference.mlm_loss import LossSettings, measure_mlm_loss
    from neobert.inference.scorer import load_scorer
    from neobert.inference.texts import open_texts

    settings = LossSettings(**explicit_values(args, LossSettings))
    where = {"device": args.device, "dtype": args.dtype, "weights": args.weights}
    scorer = load_scorer(args.model, **where, trust_remote_code=args.trust_remote_code)
    with open_texts(args.input, text_column=args.text_column, split=args.split) as texts:
        result, throughput = measure_mlm_loss(scorer, texts, settings, args.output)
        cli.say(*texts.notes, *texts.describe_gaps(), throughput.describe())
    print_answer(dataclasses.asdict(result), result.describe(), as_json=args.json)


def pseudo_perplexity(program: str, argv: list[str]) -> None:
    """Pseudo-perplexity of texts: `neobert pseudo-perplexity MODEL INPUT --output scores.jsonl`.

    Every token is masked once, alone. One line of the output for each document; the metric over all of them is printed.
    Type the same command again when it was interrupted.
    """
    parser = build_model_parser(program, pseudo_perplexity.__doc__)
    add_input(parser)
    add_limits(parser)
    parser.add_argument("--output", required=True, type=Path, help="JSONL file, one line a document")
    parser.add_argument("--chunked", type=int, metavar="K", help="faster estimate: mask every K-th token at once")
    parser.add_argument("--bias-documents", type=int, help="first documents scored exactly too (default 16)")
    args = parser.parse_args(argv)
    from neobert.inference.model import load
    from neobert.inference.pseudo_perplexity import ScoreSettings, pseudo_perplexity_to_file, summarize
    from neobert.inference.texts import open_texts

    model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
    args.max_length = min(args.max_length or model.max_length, model.max_length)
    settings = ScoreSettings(**explicit_values(args, ScoreSettings))
    with open_texts(args.input, text_column=args.text_column, split=args.split) as texts:
        throughput = pseudo_perplexity_to_file(model, texts, args.output, settings)
        cli.say(*texts.notes, *texts.describe_gaps(), throughput.describe())
    summary = summarize(args.output)
    print_answer(dataclasses.asdict(summary), summary.describe(), as_json=args.json)


def evaluate_pairs(program: str, argv: list[str]) -> None:
    """Evaluate embeddings of any model on any set of pairs: nDCG@10 and MRR, or Spearman where the pairs have scores.

    neobert evaluate-pairs outputs/run my_pairs.jsonl

    A folder with qrels/ (queries.jsonl, corpus.jsonl, qrels/test.tsv) is a retrieval set: its whole corpus is searched.
    """
    parser = build_pairs_parser(
        program,
        evaluate_pairs.__doc__,
        pairs_help="file, folder, known set or hub dataset of pairs or scored pairs, or a retrieval folder",
        prefix_help="put before positives and negatives",
    )
    args = parser.parse_args(argv)
    from neobert.contrastive.evaluate import evaluate_file

    cli.print_result(evaluate_file(args))


def mteb(program: str, argv: list[str]) -> None:
    """Evaluate an encoder on tasks of MTEB, or on local sets of the same kinds, by mteb's own protocol.

    neobert mteb outputs/run --tasks STSBenchmark SciFact my_retrieval_folder
    neobert mteb outputs/run --benchmark "MTEB(eng, v2)"

    A local set has two texts and a score (STS), a text and a label in two splits (classification), or queries, a corpus
    and qrels/ (retrieval). Type the same command again when it was interrupted: finished tasks are skipped.
    """
    parser = build_model_parser(program, mteb.__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", default=[], help="names of tasks, and local files or folders")
    what.add_argument(
        "--task-types", "--task_types", nargs="+", default=[], help="all tasks of these types: STS, Retrieval, ..."
    )
    what.add_argument("--benchmark", help='a benchmark by its name in mteb: "MTEB(eng, v2)"')
    parser.add_argument("--languages", nargs="+", help="three-letter codes (default: a task's own; eng for types)")
    parser.add_argument("--split", help="of local folders (default: test, or validation)")
    parser.add_argument("--output", type=Path, default=Path("outputs/mteb"), help="default: %(default)s")
    add_vector_settings(parser)
    add_json(parser, "print the scores as one JSON object")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("mteb") is None:
        raise CallError("neobert mteb needs the package mteb; install it with pip install -e '.[eval]'")
    from neobert.contrastive.mteb_suite import MtebRequest, run_mteb

    values: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in vars(args).items() if name != "json"
    }
    report = run_mteb(MtebRequest(**values))
    cli.say(f"results in {report.folder}")
    print_answer({**dataclasses.asdict(report), "folder": str(report.folder)}, report.describe(), as_json=args.json)
    if report.failures:
        reasons = "\n  ".join(f"{task}: {reason}" for task, reason in report.failures.items())
        raise CallError(f"{len(report.failures)} tasks failed; the same command runs them again:\n  {reasons}")


def mine_negatives(program: str, argv: list[str]) -> None:
    """Find hard negatives for pairs with an encoder, and write pairs with negatives as JSON lines.

    neobert mine-negatives outputs/run my_pairs.jsonl --output my_triplets.jsonl --num-negatives 5
    """
    parser = build_pairs_parser(
        program,
        mine_negatives.__doc__,
        pairs_help="file, folder, known set or hub dataset of pairs",
        prefix_help="put before positives",
    )
    parser.add_argument("--output", required=True, type=Path, help="file to write (.jsonl); must not exist")
    parser.add_argument("--num-negatives", type=int, help="default 5")
    parser.add_argument("--margin", type=float, help="default 0.05")
    parser.add_argument("--skip", type=int, help="nearest texts that are skipped; default 0")
    args = parser.parse_args(argv)
    from neobert.contrastive.mine import mine_file

    written, total = mine_file(args)
    print(f"{args.output}: {total:,} pairs, {written / total:.1f} negatives each")


def checkpoint(program: str, argv: list[str]) -> int:
    """Look after the checkpoints of a run: `neobert checkpoint verify|list|prune RUN`, `... diff ONE OTHER`."""
    parser = build_parser(program, checkpoint.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("verify", "read every file and compare its sha256; exit code 1 when one is damaged"),
        ("list", "step, size, age, evaluation loss"),
        ("prune", "delete what the run's retention settings do not keep"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("run", type=Path, help="run folder")
    action.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    action.add_argument("--keep", type=int, help="keep this many instead of trainer.save_total_limit")
    action = actions.add_parser("diff", help="what differs between two checkpoints or two runs")
    action.add_argument("one", type=Path)
    action.add_argument("other", type=Path)
    args = parser.parse_args(argv)
    from neobert.commands.inspect_checkpoints import diff_checkpoints, list_run, prune_run, verify_run

    whole = True
    if args.action == "verify":
        lines, whole = verify_run(args.run)
    elif args.action == "list":
        lines = list_run(args.run, time.time())
    elif args.action == "prune":
        lines = prune_run(args.run, keep=args.keep, dry_run=args.dry_run)
    else:
        lines = diff_checkpoints(args.one, args.other)
    cli.print_result("\n".join(lines))
    return 0 if whole else 1


def replay(program: str, argv: list[str]) -> None:
    """Print a row of a run by its number: `neobert replay RUN --row 1234`."""
    parser = build_parser(program, replay.__doc__)
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint is used) or checkpoint folder")
    parser.add_argument("--row", type=int, required=True, help="row number, counted from 0 at the start of the run")
    args = parser.parse_args(argv)
    from neobert.commands.replay import replay_row

    cli.print_result(replay_row(args.run, args.row).describe())
