"""Editing a checkpoint as somebody would who also knows how to write a manifest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neobert.weights.folder import MANIFEST, Manifest, record_file


def rewrite_manifest(checkpoint: Path) -> None:
    old = json.loads((checkpoint / MANIFEST).read_text())
    names = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST]
    files = {p.relative_to(checkpoint).as_posix(): record_file(p) for p in names}
    manifest = Manifest(step=old["step"], world_size=old["world_size"], files=files)
    (checkpoint / MANIFEST).write_text(manifest.to_text())


def edit_train_state(checkpoint: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = checkpoint / "train_state.json"
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))
    rewrite_manifest(checkpoint)
