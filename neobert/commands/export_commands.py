"""Commands that hand trained models on: exports, means of checkpoints, a server. Libraries are imported after the
arguments are read."""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neobert import cli
from neobert.cli import explicit_values
from neobert.commands.flags import (
    WEIGHTS_HELP,
    add_json,
    add_vector_settings,
    build_model_parser,
    build_parser,
    count,
    print_answer,
)
from neobert.errors import CallError


def export(program: str, argv: list[str]) -> None:
    """Export a trained encoder to a folder for transformers, sentence-transformers and the hub.

    neobert export outputs/run --for onnx,gguf,vllm --output outputs/run_hf

    The folder itself is what transformers and sentence-transformers load; the files of other programs are below it.
    """
    parser = build_parser(program, export.__doc__)
    parser.add_argument("source", metavar="model", help="run folder (its newest checkpoint), checkpoint, or hub name")
    parser.add_argument("--output", type=Path, help="folder to write; must not exist (default: of a run, RUN_hf)")
    parser.add_argument(
        "--for",
        dest="targets",
        default=("transformers",),
        type=_split_names,
        metavar="NAMES",
        help="transformers, sentence-transformers, onnx, gguf, vllm: one or more, with commas between",
    )
    parser.add_argument("--format", dest="form", default="auto", help="auto, native or remote_code (default auto)")
    parser.add_argument("--dtype", default="fp32", help="of the stored weights: fp32, bf16 or fp16 (default fp32)")
    parser.add_argument("--average", type=count, metavar="N", help="the mean of the newest N checkpoints of a run")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to this repository")
    parser.add_argument("--drop-decoder-bias", action="store_true", help="leave out a bias of the projection")
    parser.add_argument("--weights", default="model", help=WEIGHTS_HELP)
    parser.add_argument(
        "--language",
        default=(),
        type=_split_names,
        metavar="CODES",
        help="language of the text it was trained on, for the model card: en, or en,de",
    )
    args = parser.parse_args(argv)
    if args.output is None:
        run = Path(args.source).resolve()
        if not (run / "checkpoints").is_dir():
            parser.error(f"--output: {args.source} is no run folder, so name the folder to write")
        args.output = run.with_name(f"{run.name}_hf")
    from neobert.export.target_rows import describe_rows
    from neobert.export.write import ExportRequest
    from neobert.export.write import export as write

    with _averaged(args) as source:
        done = write(ExportRequest(**{**vars(args), **source}))
    print(*done.notes, sep="\n")
    step = "" if done.step is None else f", step {done.step:,}"
    print(f"{done.folder}/: {done.form}{step}; largest difference of a logit to ours {done.max_logit_error:.1e}")
    if done.rows:
        cli.print_result(describe_rows(done.rows))


@contextmanager
def _averaged(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a request has for `--average`: the folder of the mean, which is removed afterwards. Takes the flag out."""
    last = vars(args).pop("average")
    if last is None:
        yield {}
        return
    from neobert.commands.average_checkpoints import AverageRequest
    from neobert.commands.average_checkpoints import average_checkpoints as average

    with tempfile.TemporaryDirectory() as folder:
        mean = Path(folder) / "mean"
        done = average(AverageRequest(run=Path(args.source), output=mean, last=last, weights=args.weights))
        cli.say(done.describe())
        yield {"source": str(mean), "weights": "model"}


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def verify_export(program: str, argv: list[str]) -> int:
    """Check that an exported folder, loaded with transformers in a fresh process, matches our model."""
    parser = build_parser(program, verify_export.__doc__)
    parser.add_argument("folder", type=Path, help="exported folder")
    parser.add_argument("--against", help="the run or checkpoint it was made from (default: the folder, read by us)")
    parser.add_argument("--weights", default="model", help="with --against: model, or ema for their moving average")
    parser.add_argument("--table", action="store_true", help="measure the files of any folder")
    add_json(parser)
    args = parser.parse_args(argv)
    from neobert.export.verify import verify

    (verdict,) = verify([(args.folder, args.against)], kind=args.weights, table=args.table)
    data = {**dataclasses.asdict(verdict), "passed": verdict.passed}
    print_answer(data, verdict.describe(), as_json=args.json)
    return 0 if verdict.passed else 1


def average_checkpoints(program: str, argv: list[str]) -> None:
    """Average the last checkpoints of a run: `neobert average-checkpoints RUN --last 5 --output FOLDER`.

    The folder loads like a checkpoint: predict, embed, export, model.init_from.
    """
    parser = build_parser(program, average_checkpoints.__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--last", type=int, help="average the newest so many checkpoints (default 5)")
    parser.add_argument("--steps", type=int, nargs="+", help="average these steps instead")
    parser.add_argument("--shares", type=float, nargs="+", help="weight of each, in the order of the steps")
    parser.add_argument("--weights", default="model", help=WEIGHTS_HELP)
    args = parser.parse_args(argv)
    from neobert.commands.average_checkpoints import AverageRequest
    from neobert.commands.average_checkpoints import average_checkpoints as average

    request = AverageRequest(
        run=args.run,
        output=args.output,
        last=args.last,
        steps=None if args.steps is None else tuple(args.steps),
        shares=None if args.shares is None else tuple(args.shares),
        weights=args.weights,
    )
    print(f"{request.output}/: {average(request).describe()}")


def serve(program: str, argv: list[str]) -> None:
    """Answer requests for embeddings, as OpenAI's clients make them, and fill masks: `neobert serve MODEL`.

    POST /v1/embeddings, POST /v1/fill-mask, GET /v1/models, GET /health. Ctrl-C stops it.
    """
    parser = build_model_parser(program, serve.__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes one that is free")
    parser.add_argument("--name", help="what clients call the model (default: the name of its folder)")
    add_vector_settings(parser)
    parser.add_argument("--truncate", action="store_true", default=None, help="cut texts that are too long")
    parser.add_argument("--max-texts", type=int, help="texts of a request (default 2048)")
    parser.add_argument("--max-tokens", type=int, help="tokens of a request (default 262144)")
    parser.add_argument("--max-guesses", type=int, help="masks x top_k of a request (default 100000)")
    parser.add_argument("--max-body-bytes", type=int, help="bytes of a request (default 16777216)")
    parser.add_argument("--max-waiting", type=int, help="requests that may wait (default 64)")
    args = parser.parse_args(argv)
    from neobert.inference.http_server import ModelServer
    from neobert.inference.http_server import serve as answer
    from neobert.inference.service import ServeLimits, Service
    from neobert.inference.text_encoder import OwnEncoder, load_text_encoder
    from neobert.weights.encoder_weights import find_weights, is_of_transformers

    limits = ServeLimits(**explicit_values(args, ServeLimits))
    with ModelServer(args.host, args.port) as server:  # What another program listens on is said before anything loads.
        if is_of_transformers(find_weights(args.model)):
            raise CallError(
                f"{args.model}: an encoder of transformers, which is not served here; continue it with "
                "model.init_from, or serve it with the program it is made for"
            )
        where = {"device": args.device, "dtype": args.dtype, "weights": args.weights}
        encoder = load_text_encoder(args.model, **where, pooling=args.pooling, max_length=args.max_length)
        if not isinstance(encoder, OwnEncoder):
            raise CallError(f"{args.model}: not an encoder of this package; serve it with the program it is made for")
        service = Service(encoder, args.name or Path(args.model).resolve().name, limits)
        settings = encoder.settings
        cli.say(
            f"{service.name} at {server.url}: {settings.pooling} pooling, texts of up to {settings.max_length} tokens; "
            "Ctrl-C stops it"
        )
        answer(server, service)
