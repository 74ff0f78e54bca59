"""Parts of a tokenised folder, written by several machines, as the one folder that a single job would have written.

Parts are joined by a description as soon as they are all there, and train as they are. Where one folder without parts
is needed, its files are written again here: rows in their order, cut into batches and files as a single job cuts them,
so the bytes are those of that job.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neobert.commands.tokenize_dataset import SUMS, check_token_types
from neobert.data.rows.lanes import IntArray
from neobert.data.store.arrow import load_table, read_manifest
from neobert.data.store.prepare import work_folder
from neobert.data.store.token_folder import TokenWriter, describe_differences, write_description
from neobert.disk import locked, sync
from neobert.errors import DataError

_IDENTITY = ("format", "source", "tokenizer_digest", "special_tokens", "settings")


def merge_parts(parts: Path, output: Path) -> dict[str, Any]:
    """Writes the parts in a folder as the folder `output`; returns its manifest.

    Raises:
        DataError: parts are missing, damaged or made with different settings, or `output` is there already.
    """
    if output.exists():
        raise DataError(f"--merge: {output} is there already; remove it, or choose another folder")
    folders, manifests = find_parts(parts)
    first = manifests[0]
    with locked(work_folder(output)):
        folder = work_folder(output) / "output"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        settings, ids = first["settings"], first["special_ids"]
        writer = TokenWriter(
            folder,
            around=(ids["cls"], ids["sep"]) if first["special_tokens"] else None,
            special_tokens_mask=settings["special_tokens_mask"],
            document_numbers=settings["max_length"] is not None,
            file_tokens=settings["file_tokens"],
            token_type=first.get("token_type", "int32"),
        )
        for number, pieces in enumerate(_documents(folders, first)):
            writer.add(pieces, number)
        writer.finish_file()
        manifest = first | {name: sum(found[name] for found in manifests) for name in SUMS}
        manifest |= {"part": None, "files": dict(writer.files)}
        write_description(folder, files=list(writer.files), features=writer.features, manifest=manifest)
        folder.rename(output)
        sync(output.parent)
        shutil.rmtree(work_folder(output))
    return manifest


def find_parts(parts: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """All parts in their order, complete and undamaged, and their manifests.

    Raises:
        DataError: naming every part that is missing, unfinished or damaged.
    """
    found = sorted(path for path in parts.glob("part-*-of-*") if path.is_dir())
    if not found:
        raise DataError(f"--output: {parts} holds no parts; write them with --shard i/n")
    counts = {int(path.name.rsplit("-", 1)[1]) for path in found}
    if len(counts) > 1:
        raise DataError(f"--output: {parts} holds parts of {' and of '.join(map(str, sorted(counts)))}; remove others")
    (count,) = counts
    folders = [parts / f"part-{number + 1:05d}-of-{count:05d}" for number in range(count)]
    manifests = [read_manifest(folder) for folder in folders]
    missing = [f"{n + 1}/{count}" for n, manifest in enumerate(manifests) if manifest is None]
    if missing:
        raise DataError(f"{parts}: part {', '.join(missing)} is not complete; write it with --shard")
    complete = [manifest for manifest in manifests if manifest is not None]
    for folder, manifest in zip(folders, complete):
        differences = describe_differences(_identity(manifest), _identity(complete[0]))
        if differences:
            raise DataError(f"{folder} is made with other data or settings than the first part ({differences})")
        for name, entry in manifest["files"].items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise DataError(
                        f"{folder / name} is damaged: its sha256 is not that of its manifest; write it again"
                    )
    check_token_types(folders, complete)
    return folders, complete


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: manifest.get(name) for name in _IDENTITY}


def _documents(folders: list[Path], manifest: Mapping[str, Any]) -> Iterator[list[IntArray]]:
    """The rows of each document, without special tokens around them."""
    cut = 1 if manifest["special_tokens"] else 0
    for folder in folders:
        if not json.loads((folder / "manifest.json").read_text())["num_pieces"]:
            continue
        table = load_table(folder)
        rows: list[IntArray] = []
        last: int | None = None
        for batch in table.to_batches():
            offsets = batch.column("input_ids").offsets.to_numpy()
            values = batch.column("input_ids").values.to_numpy()
            numbers = batch.column("document").to_numpy().tolist() if "document" in table.column_names else None
            for row in range(len(batch)):
                number = numbers[row] if numbers is not None else None
                if rows and (number is None or number != last):
                    yield rows
                    rows = []
                last = number
                rows.append(values[offsets[row] + cut : offsets[row + 1] - cut].astype(np.int32))
        if rows:
            yield rows
