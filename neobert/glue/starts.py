"""What a cell starts from: an encoder, or one of the baselines that are made of it."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file

from neobert.config.schema import Config
from neobert.config.schema_data import TokenizerSection
from neobert.errors import DataError
from neobert.model.config import ARCHITECTURE
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights, find_weights, load_encoder_weights
from neobert.weights.folder import MANIFEST, MODEL_FILE, Manifest, record_file


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStart:
    """Where the weights, the architecture and the tokenizer of a cell come from."""

    name: str
    """For tables."""

    identity: str
    """A digest of all that."""

    apply: Callable[[Config], Config]
    """The config that starts there."""

    @classmethod
    def none(cls) -> Self:
        """Of a config that is only described."""
        return cls(name="", identity="", apply=lambda config: config)


def choose_start_of(config: Config, output_dir: Path) -> ModelStart:
    """What `glue.model` means. What a baseline needs on disk is written below `output_dir`.

    Raises:
        DataError: there is nothing there to start from, or no baseline can be made of it.
    """
    section = config.glue
    if section.model is None:  # With glue.allow_random_weights, which the rules ask for.
        return _build_random(config, "random weights")
    kind, colon, source = section.model.partition(":")
    try:
        if colon and kind in BASELINES:
            return BASELINES[kind](config, source, output_dir)
        return build_trained_start(section.model)
    except WeightsError as error:
        raise DataError(f"glue.model: {error}") from error


def build_trained_start(source: str | Path) -> ModelStart:
    """The weights at `source`: those that are there now, also when a run goes on writing newer ones.

    Raises:
        WeightsError: there are none.
    """
    folder = find_weights(source)

    def apply(config: Config) -> Config:
        return replace(config, finetune=replace(config.finetune, model=str(folder)))

    return ModelStart(name=str(source), identity=_digest_files(folder), apply=apply)


def _build_random_of(config: Config, source: str, output_dir: Path) -> ModelStart:
    weights = _load(source)
    theirs = {name: getattr(weights.config, name) for name in ARCHITECTURE}
    bound = replace(
        config,
        model=replace(config.model, **theirs, vocab_size=weights.config.vocab_size),
        tokenizer=TokenizerSection(path=str(weights.tokenizer)),
    )
    return _build_random(bound, f"random:{source}")


def _build_random(bound: Config, name: str) -> ModelStart:
    """Random weights of sections `model` and `tokenizer` of a config."""

    def apply(config: Config) -> Config:
        finetune = replace(config.finetune, model=None, allow_random_weights=True)
        model = replace(bound.model, dropout_prob=config.model.dropout_prob)
        return replace(config, model=model, tokenizer=bound.tokenizer, finetune=finetune)

    path = bound.tokenizer.path
    words = None if path is None else _digest_files(Path(path))
    text = json.dumps([asdict(bound.model), asdict(bound.tokenizer) if words is None else words], sort_keys=True)
    return ModelStart(name=name, identity=f"random {hashlib.sha256(text.encode()).hexdigest()}", apply=apply)


def _build_bag_of(config: Config, source: str, output_dir: Path) -> ModelStart:
    """The mean of the rows of the embedding matrix, each through the last norm: one block that adds nothing, and is
    frozen with the embeddings, so that only the norm and the head learn."""
    weights = _load(source)
    if weights.config.ngpt or not weights.config.rope:
        raise DataError(
            f"glue.model: bag:{source} has model.ngpt: true or model.rope: false, of which no bag of embeddings is "
            "made; write random: for another baseline"
        )
    folder = output_dir / "baselines" / f"bag_{_digest_files(weights.folder)[:12]}"
    if not (folder / MANIFEST).is_file():
        _write_bag(weights, folder)
    start = build_trained_start(folder)

    def apply(plain: Config) -> Config:
        bound = start.apply(plain)
        return replace(bound, finetune=replace(bound.finetune, num_frozen_layers=1))

    return ModelStart(name=f"bag:{source}", identity=f"bag {start.identity}", apply=apply)


def _load(source: str) -> EncoderWeights:
    weights = load_encoder_weights(source)
    if weights.tokenizer is None:
        raise DataError(f"glue.model: {source} has no tokenizer.json; put the tokenizer it was trained with there")
    return weights


def _write_bag(weights: EncoderWeights, folder: Path) -> None:
    """A checkpoint with the embeddings of `weights` and one block that is the identity; the manifest comes last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    others = tuple(f"encoder.layers.{number}." for number in range(1, weights.config.num_hidden_layers))
    tensors = {name: x.float().clone() for name, x in weights.tensors.items() if not name.startswith(others)}
    for name in ("encoder.layers.0.out.weight", "encoder.layers.0.down.weight"):
        tensors[name].zero_()
    tensors["encoder.norm.weight"] = torch.ones_like(tensors["encoder.norm.weight"])
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    config = dataclasses.replace(weights.config, num_hidden_layers=1)
    (folder / "model_config.json").write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
    assert weights.tokenizer is not None, "checked by _load"
    shutil.copytree(weights.tokenizer, folder / "tokenizer")
    files = {path.relative_to(folder).as_posix(): record_file(path) for path in folder.rglob("*") if path.is_file()}
    (folder / MANIFEST).write_text(Manifest(step=0, world_size=1, files=files).to_text())


_IDENTIFIED = (".safetensors", ".bin", "config.json", "tokenizer.json", "config.yaml")


def _digest_files(folder: Path) -> str:
    """sha256 of the weights, the architecture and the tokenizer in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(_IDENTIFIED))
    sums = [(path.relative_to(folder).as_posix(), record_file(path).sha256) for path in files]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


BASELINES: dict[str, Callable[[Config, str, Path], ModelStart]] = {"random": _build_random_of, "bag": _build_bag_of}
"""Beginning of `glue.model` -> what it makes of the model after it."""
