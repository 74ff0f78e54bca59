"""A tokenised folder written by several machines, each its own part.

Part i of n is the folder `part-0000i-of-0000n` in the output, complete in itself. Whoever finds all parts complete
describes them together: the output then reads as one folder whose files are those of the parts, in source order. The
description depends on the parts alone, so it does not matter who writes it, or how many do.
"""

import json
from pathlib import Path
from typing import Any

from neobert.data.arrow import read_manifest
from neobert.data.errors import DataError
from neobert.data.prepare import read_progress, work_folder
from neobert.data.prepare_settings import PrepareSettings, describe_differences, make_identity
from neobert.data.token_writer import write_description
from neobert.data.tokenizer import Tokenizer

_SUMS = ("num_documents", "num_pieces", "num_tokens", "bad", "skipped", "short")


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
            f"{output} holds {strangers[0]}, but --shard is given for {count} parts; use the same number on every "
            "machine, or choose another --output"
        )
    wanted = _without_part(make_identity(fingerprint, tokenizer, settings, None))
    for number in range(count):
        folder = part_folder(output, number, count)
        found = read_manifest(folder) or read_progress(work_folder(folder)).get("identity")
        if found is not None and (differences := describe_differences(_without_part(found), wanted)):
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
    joined = manifests[0] | {name: sum(manifest[name] for manifest in manifests) for name in _SUMS}
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


def _without_part(identity: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "part"}
