"""Which checkpoint is used, and why another one is not."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from neobert.weights.folder import (
    MANIFEST,
    CheckpointError,
    Manifest,
    check_contents,
    checkpoint_steps,
    choose_checkpoint,
    choose_newest,
    record_file,
    valid_steps,
)

FILES = {"model.safetensors": b"weights " * 100, "optimizer.bin": b"moments", "tokenizer/tokenizer.json": b"{}"}


def make_checkpoint(run: Path, step: int, *, manifest_step: int | None = None) -> Path:
    folder = run / "checkpoints" / str(step)
    (folder / "tokenizer").mkdir(parents=True)
    for name, content in {**FILES, "train_state.json": json.dumps({"step": step}).encode()}.items():
        (folder / name).write_bytes(content)
    names = [*FILES, "train_state.json"]
    records = {name: record_file(folder / name) for name in names}
    manifest = Manifest(step=manifest_step or step, world_size=1, files=records)
    (folder / MANIFEST).write_text(manifest.to_text())
    return folder


def edit_manifest(folder: Path, edit: Callable[[str], str]) -> None:
    path = folder / MANIFEST
    path.write_text(edit(path.read_text()))


def flip_bit(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_the_manifest_on_disk_has_the_documented_form(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 40)
    written = json.loads((folder / MANIFEST).read_text())
    own = written.pop("self")
    assert own == sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    assert list(written) == ["format", "step", "world_size", "files"]
    assert (written["format"], written["step"], written["world_size"]) == (1, 40, 1)
    assert written["files"]["optimizer.bin"] == {"bytes": 7, "sha256": sha256(b"moments").hexdigest()}
    assert check_contents(folder).num_bytes == 800 + 7 + 2 + len('{"step": 40}')


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda folder: os.truncate(folder / "model.safetensors", 100),
        "model.safetensors is 100 bytes, manifest.json says 800 (truncated write or disk full)",
    ),
    "zero bytes after a power loss": (
        lambda folder: os.truncate(folder / "model.safetensors", 0),
        "model.safetensors is 0 bytes, manifest.json says 800 (power loss or disk full)",
    ),
    "one bit of the weights": (
        lambda folder: flip_bit(folder / "model.safetensors", 17),
        "model.safetensors does not match its sha256 in manifest.json (a changed bit)",
    ),
    "one bit of the optimizer": (
        lambda folder: flip_bit(folder / "optimizer.bin"),
        "optimizer.bin does not match its sha256 in manifest.json (a changed bit)",
    ),
    "a file is missing": (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
    "half a manifest": (
        lambda folder: edit_manifest(folder, lambda text: text[: len(text) // 2]),
        "manifest.json is torn or altered",
    ),
    "an empty manifest": (lambda folder: edit_manifest(folder, lambda text: ""), "manifest.json is torn or altered"),
    "another length in the manifest": (
        lambda folder: edit_manifest(folder, lambda text: text.replace('"bytes": 7', '"bytes": 8')),
        "manifest.json is altered: its own sha256 does not match",
    ),
    "a manifest of a later format": (
        lambda folder: edit_manifest(folder, lambda text: text.replace('"format": 1', '"format": 2')),
        "manifest.json has format 2, this code reads 1",
    ),
    "a manifest that is a list": (
        lambda folder: edit_manifest(folder, lambda text: "[]"),
        "manifest.json is torn or altered",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path: Path, damage: str) -> None:
    good, bad = make_checkpoint(tmp_path, 20), make_checkpoint(tmp_path, 40)
    spoil, reason = DAMAGES[damage]
    spoil(bad)
    choice = choose_newest(tmp_path)
    assert choice.path == good
    assert len(choice.notes) == 1
    assert choice.notes[0].startswith(f"checkpoint {bad} skipped: {reason}")


def test_a_manifest_of_another_step_is_noticed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 40, manifest_step=20)
    with pytest.raises(CheckpointError, match=r"40 skipped: manifest.json is that of step 20"):
        choose_newest(tmp_path)


def test_the_newest_is_the_highest_step_whatever_the_clock_said(tmp_path: Path) -> None:
    for step, time in ((5, 3_000_000), (20, 2_000_000), (100, 1_000_000)):
        os.utime(make_checkpoint(tmp_path, step), (time, time))
    assert choose_newest(tmp_path).path == tmp_path / "checkpoints" / "100"
    assert choose_newest(tmp_path).notes == ()


def test_all_damaged_is_an_error_that_lists_every_reason_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert choose_newest(tmp_path / "empty").path is None
    flip_bit(make_checkpoint(tmp_path, 20) / "optimizer.bin")
    (make_checkpoint(tmp_path, 40) / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as caught:
        choose_newest(tmp_path)
    text = str(caught.value)
    assert "has 2 checkpoint(s) and none is valid" in text
    assert "/40 skipped: it has no manifest.json" in text
    assert "/20 skipped: optimizer.bin does not match its sha256" in text


def test_an_explicit_path_never_falls_back(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 20)
    bad = make_checkpoint(tmp_path, 40)
    flip_bit(bad / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"40 is damaged: optimizer.bin does not match.*choose another step"):
        choose_checkpoint(bad)
    assert choose_checkpoint(tmp_path).path == choose_checkpoint(tmp_path / "checkpoints").path == bad.parent / "20"


def test_a_checkpoint_without_a_manifest_loads_only_when_it_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 20)
    (folder / MANIFEST).unlink()
    choice = choose_checkpoint(folder)
    assert choice.path == folder
    assert "has no manifest.json" in choice.notes[0]
    with pytest.raises(CheckpointError, match="none is valid"):
        choose_checkpoint(tmp_path)


def test_a_copy_under_another_name_is_a_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 20)
    copy = folder.rename(tmp_path / "my-model")
    assert choose_checkpoint(copy).path == copy


def test_other_names_in_the_folder_are_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 40)
    for name in ("tmp", "best", "0040", "41.tmp", "-1", ".tmp-48-abc", ".trash-4", "٤٨", "1e3"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / ".DS_Store").touch()
    (tmp_path / "checkpoints" / "99").touch()
    assert checkpoint_steps(tmp_path) == valid_steps(tmp_path) == [40]
    assert choose_newest(tmp_path).path == tmp_path / "checkpoints" / "40"
