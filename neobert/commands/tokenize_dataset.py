"""One split of one source becomes a folder of tokens: what `tokenize_dataset.py` does.

A tokenised folder written by several machines, each its own part.

Part i of n is the folder `part-0000i-of-0000n` in the output, complete in itself. Whoever finds all parts complete
describes them together: the output then reads as one folder whose files are those of the parts, in source order. The
description depends on the parts alone, so it does not matter who writes it, or how many do.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neobert import cli
from neobert.config.schema_data import DatasetSection
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT
from neobert.data.source.spec import describe_source
from neobert.data.store.arrow import read_manifest
from neobert.data.store.offline import describe_origin, describe_tokenizer, name_tokenizer, open_text_split
from neobert.data.store.prepare import prepare_tokens, read_progress, work_folder
from neobert.data.store.report import list_folders, write_report
from neobert.data.store.token_folder import PrepareSettings, describe_differences, make_identity, write_description
from neobert.data.tokenizer import Tokenizer, check_mask_token, limit_threads, load_tokenizer
from neobert.errors import DataError
from neobert.secrets import scrub

SUMS = ("num_documents", "num_pieces", "num_tokens", "bad", "skipped", "short")


def part_folder(output: Path, number: int, count: int) -> Path:
    """Where part `number` (from 0) of `count` is written."""
    return output / f"part-{number + 1:05d}-of-{count:05d}"


def check_parts(output: Path, fingerprint: str, tokenizer: Tokenizer, settings: PrepareSettings, count: int) -> None:
    """Raises when what is in `output` cannot become one folder with parts of these settings.

    Raises:
        DataError: there is other data, another number of parts, or a part made with other settings.
    """
    manifest = read_manifest(output)
    if (output / "state.json").exists() and (manifest is None or "parts" not in manifest):
        raise DataError(f"{output} holds tokenised data without parts; choose another --output for --shard")
    strangers = [path.name for path in output.glob("part-*-of-*") if not path.name.endswith(f"-of-{count:05d}")]
    if strangers:
        raise DataError(
            f"{output} holds {strangers[0]}, but --shard is set for {count} parts; use the same number on every "
            "machine, or choose another --output"
        )
    expected = _without_part(make_identity(fingerprint, tokenizer, settings, None))
    for number in range(count):
        folder = part_folder(output, number, count)
        found = read_manifest(folder) or read_progress(work_folder(folder)).get("identity")
        if found is not None and (differences := describe_differences(_without_part(found), expected)):
            raise DataError(
                f"{folder} is made with other data or settings ({differences}); give all parts the same ones, or "
                "choose another --output"
            )


def join_parts(output: Path, count: int) -> dict[str, Any] | None:
    """Describes the parts as one folder and returns its manifest; None while a part is missing.

    Raises:
        DataError: there is no document in any part.
    """
    folders = [part_folder(output, number, count) for number in range(count)]
    found = [read_manifest(folder) for folder in folders]
    manifests = [manifest for manifest in found if manifest is not None]
    if len(manifests) < count:
        return None
    check_token_types(folders, manifests)
    joined = manifests[0] | {name: sum(manifest[name] for manifest in manifests) for name in SUMS}
    joined |= {"part": None, "parts": count}
    if not joined["num_documents"]:
        raise DataError("the source has no usable documents; check --dataset and --text-column")
    joined["files"] = {
        f"{folder.name}/{name}": entry
        for folder, manifest in zip(folders, manifests)
        for name, entry in sorted(manifest["files"].items())
    }
    info = json.loads((folders[0] / "dataset_info.json").read_text())
    write_description(output, files=list(joined["files"]), features=info["features"], manifest=joined)
    return joined


def check_token_types(folders: Sequence[Path], manifests: Sequence[Mapping[str, Any]]) -> None:
    """Raises where parts cannot be one folder.

    Raises:
        DataError: their tokens are integers of different sizes.
    """
    types = [manifest.get("token_type", "int32") for manifest in manifests]
    if len(set(types)) > 1:
        old = folders[types.index("int32")]
        raise DataError(f"{old} holds int32, as earlier versions wrote it, others uint16; remove it and write it again")


def _without_part(identity: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "part"}


def run_tokenize(args: argparse.Namespace) -> None:
    """Does what the arguments ask for.

    Raises:
        DataError: a source or the tokenizer cannot be used, with the flag and the remedy.
    """
    _check(args)
    if args.merge is not None:
        from neobert.commands.merge_parts import merge_parts  # It needs this module.

        _say_written(args.merge, merge_parts(args.output, args.merge))
        return
    if args.dataset is not None:
        _tokenize(args)
    if args.report:
        for folder in list_folders(args.output):
            print(write_report(folder, args.max_length).text)


def _check(args: argparse.Namespace) -> None:
    """Raises for flags that do not go together.

    Raises:
        DataError: with the flag and the remedy.
    """
    if args.merge is not None and (args.dataset is not None or args.report):
        raise DataError("--merge reads parts that are written already: give --output and --merge alone")
    if args.dataset is None and not args.report and args.merge is None:
        raise DataError("--dataset is missing: name a hub data set, or a local file, folder or pattern")
    if args.dataset is not None and args.tokenizer is None:
        raise DataError("--tokenizer is missing: name a folder with a tokenizer, or one on the hub")
    smallest = 1 if args.no_special_tokens else 1 + SPECIALS_PER_SEGMENT
    for flag, value, least in (
        ("--max-length", args.max_length, smallest),
        ("--num-proc", args.num_proc, 1),
        ("--max-samples", args.max_samples, 1),
    ):
        if value is not None and value < least:
            raise DataError(f"{flag}: {value} is too small; give at least {least}")
    if args.return_special_tokens_mask and args.no_special_tokens:
        raise DataError("--return-special-tokens-mask marks what --no-special-tokens leaves out; drop one of them")
    if args.shard and args.max_samples:
        raise DataError("--max-samples counts from the start of the source, so it cannot be cut with --shard")


def _tokenize(args: argparse.Namespace) -> None:
    limit_threads(args.num_proc)
    spec = describe_source(args.dataset, text_column=args.text_column, config=args.dataset_config)
    section = describe_tokenizer(args.tokenizer)
    tokenizer = load_tokenizer(section)
    check_mask_token(tokenizer)
    if tokenizer.note is not None:
        cli.say(f"warning: {tokenizer.note}")
    source, span = open_text_split(spec, args.split, tokenizer)
    settings = PrepareSettings(
        max_document_chars=DatasetSection().max_document_chars,
        max_bad_records=DatasetSection().max_bad_records,
        text_column=args.text_column,
        split=args.split,
        special_tokens=not args.no_special_tokens,
        special_tokens_mask=args.return_special_tokens_mask,
        max_length=args.max_length,
        max_documents=args.max_samples or spec.max_documents,
    )
    for note in [*source.inventory.notes(), *source.notes]:
        print(scrub(note))
    cli.say(*(f"warning: {text}" for text in source.inventory.warnings()))
    folder, part = args.output, args.shard
    if part is not None:
        check_parts(args.output, source.fingerprint, tokenizer, settings, part[1])
        if not span.is_whole:
            raise DataError(f"--shard cuts a whole split, and --split: {args.split} is a slice; drop one of them")
        folder, span = part_folder(args.output, *part), source.part(*part)
    manifest: dict[str, Any] | None = prepare_tokens(
        source,
        tokenizer,
        folder,
        settings,
        span=span,
        origin=describe_origin(spec, source, name_tokenizer(section)),
        part=part,
        replace_other=False,
        label=str(folder),
    )
    _say_written(folder, manifest or {})
    if part is not None:
        manifest = join_parts(args.output, part[1])
        if manifest is None:
            print(f"other parts of {args.output} are not written yet; the machine that finishes last joins them")
            args.report = False
            return
        _say_written(args.output, manifest)
    print(f"train on it with: --dataset.path {shlex.quote(str(args.output))} --dataset.streaming false")


def _say_written(folder: Path, manifest: dict[str, Any]) -> None:
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(
        f"{folder}: {manifest['num_documents']:,} documents in {manifest['num_pieces']:,} rows, "
        f"{manifest['num_tokens']:,} tokens, {size / 1e6:,.1f} MB; {manifest['bad']} records could not be read, "
        f"{manifest['skipped']} had no text"
    )
