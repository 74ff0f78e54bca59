"""The tracks of the speedrun: what is equal for every record of one, and what a config may not change.

A track fixes the data (by a manifest of their files), the tokenizer, the class of hardware, how much may be trained
(seconds of training, or row slots) and which loss is the goal. The evaluation is that of the yardstick
(`trial.HELD_OUT`) and no key of a config reaches it. Everything else is free. Read and checked without torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.config.fields import FIELDS, SECTIONS, LeafError, parse_value
from neobert.config.load import load_config, split_arguments
from neobert.config.schema import Config
from neobert.config.schema_data import FILLS_MASKS
from neobert.config.source import Leaf, Tree, VariableError, YamlError, parse_yaml, read_yaml_text, substitute
from neobert.errors import CallError, UserError


class SpeedrunError(UserError, ValueError):
    """A record cannot be made or read; the message names the file or the key, its value and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """What every record of it has in common."""

    name: str
    title: str
    data: tuple[str, ...]
    """Names of data sets, each with a manifest `speedrun/data/NAME.json`. Records compare on one of them only."""

    tokenizer: tuple[str, ...]
    """Settings laid over every config."""

    tokenizer_sha256: str | None
    """`speedrun.digest_tokenizer` of it; None for one that each run trains from the data."""

    hardware: str
    gpus: tuple[str, ...] = ()
    """Of which the name of the GPU has one; empty: the run computes on a CPU."""

    threads: int | None
    """That compute; None: as many as are requested."""

    seconds: float | None = None
    """Of training, as the yardstick counts them."""

    slots: int | None = None
    """Of rows: their number x their length."""

    goal: float | None
    """Held-out loss in nats per masked token, mean over the seeds."""

    logging_steps: int = 25
    """The clock leaves the first interval out, so its length is no choice."""

    @property
    def limit(self) -> str:
        """How much may be trained, in words."""
        return f"{self.seconds:,.0f} s of training" if self.seconds is not None else f"{self.slots:,} row slots"

    @property
    def settings(self) -> tuple[str, ...]:
        """Laid over every config: the tokenizer, the device, the clock's interval."""
        device = "cuda" if self.gpus else "cpu"
        return (*self.tokenizer, f"trainer.device={device}", f"trainer.logging_steps={self.logging_steps}")


FIXED = {
    "the data": (
        *("dataset.path", "dataset.name", "dataset.config", "dataset.revision", "dataset.mixture"),
        *("dataset.mixture_alpha", "dataset.train_split", "dataset.text_column", "dataset.sample_by"),
    ),
    "the tokenizer": tuple(key for key in FIELDS if key.startswith("tokenizer.")),
    "the seeds": ("seed",),
    "the task": ("task",),
    "the hardware": ("trainer.device", "trainer.use_cpu", "trainer.cpu_threads"),
    "the start from random weights": ("model.init_from", "distill.teacher", "trainer.resume_from_checkpoint"),
}
"""What a track decides -> the keys of a config for it. Each has its default there, or the value of the track."""

_REMEDIES = {
    "the data": "the data come with --data; remove the key",
    "the tokenizer": "use {expected} or remove the key; a local copy of the same tokenizer comes with --tokenizer",
    "the seeds": "remove the key and write --seeds",
}


def check_config(track: Track, file: Path, settings: Sequence[str]) -> None:
    """Whether a config, with settings laid over it, leaves what a track fixes.

    Raises:
        SpeedrunError: with every key that does not, its value and the remedy.
    """
    own = {key: Leaf(text or "true") for key, text in split_arguments(track.settings)[0]}
    try:
        written = _read_written(file)
    except (YamlError, VariableError) as error:
        raise SpeedrunError(f"{file}: {error}") from error
    written |= {key: Leaf("true" if text is None else text) for key, text in split_arguments(settings)[0]}
    wrong = []
    for what, keys in FIXED.items():
        for key in (key for key in keys if key in written):
            expected = parse_value(FIELDS[key], own[key]) if key in own else FIELDS[key].default
            try:
                found = parse_value(FIELDS[key], written[key])
            except LeafError as error:
                raise SpeedrunError(f"{file}: {key}: {error}") from error
            if found not in (expected, FIELDS[key].default):
                remedy = _REMEDIES.get(what, "use {expected} or remove the key").format(expected=expected)
                wrong.append(f"{key}: {found!r}, but {what} of the track {track.name} may not change; {remedy}")
    if wrong:
        raise SpeedrunError("\n  - ".join([f"{len(wrong)} key(s) of {file} that a record may not set:", *wrong]))


def _read_written(file: Path) -> dict[str, Tree]:
    """The values that a config file writes, by key. A whole section may be a variable, so these are replaced first."""
    tree = parse_yaml(read_yaml_text(file, "the config file"))
    variables = tree.pop("variables", {})
    values = {name: substitute(value, variables if isinstance(variables, dict) else {}) for name, value in tree.items()}
    return dict(_flatten(values))


def _flatten(tree: dict[str, Tree], prefix: str = "") -> Iterator[tuple[str, Tree]]:
    """The keys below the sections of a config, as they are written; unknown ones too."""
    for name, value in tree.items():
        key = prefix + name
        if key in SECTIONS and isinstance(value, dict):
            yield from _flatten(value, f"{key}.")
        elif key in FIELDS:
            yield key, value


def build_config(track: Track, file: Path, settings: Sequence[str], data: Path, *, seed: int = 0) -> Config:
    """The config of every run of a record, but for the number of steps.

    Raises:
        SpeedrunError: it sets what a track fixes, or trains what cannot be scored.
        ConfigError: anything else that is wrong with it.
    """
    check_config(track, file, settings)
    last = [f"dataset.path={data}", f"seed={seed}", "trainer.max_steps=1", "trainer.save_strategy=no"]
    # Weights are scored at the end, so they are saved then; a run that is resumed is not overwritten.
    last += ["trainer.eval_strategy=no", "trainer.eval_max_batches=1", "trainer.save_model=true"]
    config = load_config(file, [*settings, *track.settings, *last, "trainer.overwrite_output_dir=false"])
    objective, allowed = config.trainer.objective, FILLS_MASKS.partition("=")[2].split("|")
    if objective not in allowed:
        raise SpeedrunError(
            f"trainer.objective: {objective}, whose weights have no loss of masked tokens; use {' or '.join(allowed)}"
        )
    return config


def choose_track(name: str) -> Track:
    """The track of a name. Raises CallError."""
    if name not in TRACKS:
        raise CallError(f"track: {name!r} is unknown; write one of {', '.join(TRACKS)}")
    return TRACKS[name]


_BERT: dict[str, Any] = {
    "tokenizer": ("tokenizer.name=bert-base-uncased",),
    "tokenizer_sha256": "8c57475e70f5992e3540411db39a42d34b5855af00e2c2ba7a3c9be6b3e2af83",
}
_WIKIPEDIA: dict[str, Any] = {"data": ("wikipedia-2014", "wikimedia-20231101.en"), **_BERT}

TRACKS: dict[str, Track] = {
    track.name: track
    for track in (
        Track(
            name="cpu-417s",
            title="Wikipedia, 417 seconds on two CPU cores",
            **_WIKIPEDIA,
            hardware="two CPU cores",
            threads=2,
            seconds=417.0,
            goal=4.63,
        ),
        Track(
            name="stdlib-417s",
            title="Python's standard library, 417 seconds on two CPU cores, offline",
            data=("cpython-3.11.7",),
            tokenizer=("tokenizer.train=true", "tokenizer.vocab_size=8192"),
            tokenizer_sha256=None,
            hardware="two CPU cores",
            threads=2,
            seconds=417.0,
            goal=None,
        ),
        Track(
            name="cpu-tokens",
            title="Wikipedia, 6 million row slots, any CPU, no clock",
            **_WIKIPEDIA,
            hardware="any CPU",
            threads=None,
            slots=6_000_000,
            goal=4.9,
        ),
        Track(
            name="gpu-30min",
            title="Wikipedia, 30 minutes on one H100 or H200",
            data=("wikimedia-20231101.en-2m",),
            **_BERT,
            hardware="one H100 or H200",
            gpus=("H100", "H200"),
            threads=None,
            seconds=1800.0,
            goal=None,
        ),
    )
}
