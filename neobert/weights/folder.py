"""The folder of a run: every `checkpoints/<step>/` is a complete checkpoint, and nothing else has a decimal name."""

from pathlib import Path


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps that have a checkpoint, ascending. Only folders with plain decimal names count."""
    folder = output_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(
        int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal() and str(int(p.name)) == p.name
    )


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` means: itself, or the newest one of a run folder or a `checkpoints` folder."""
    if (path / "train_state.json").is_file():
        return path
    run_folder = path.parent if path.name == "checkpoints" else path
    steps = checkpoint_steps(run_folder)
    return run_folder / "checkpoints" / str(steps[-1]) if steps else None
