"""The weights of an encoder, from wherever it was trained: architecture, tensors by our names, tokenizer, step.

What a folder is, is read off its files:

- `config.json`: a model of transformers. Its `model_type` says of which family (`TYPES` in `neobert.weights.layouts`).
- `model_config.json` alone: a checkpoint of ours.
- `config.yaml` alone: a checkpoint of the fork of NeoBERT that this project's keys come from.
- `checkpoints/`: a run; the newest checkpoint counts.

A name of the form `owner/model` that is no folder is fetched from the Hugging Face hub, `owner/model@revision` at that
revision.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neobert.config.nesting import load_plain_yaml, parse_json
from neobert.config.schema_data import TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.model.config import ModelConfig
from neobert.model.hub_encoder import describe_backbone, load_backbone
from neobert.objectives.base import Objective
from neobert.objectives.causal_lm import CLM
from neobert.objectives.mlm import MLM
from neobert.objectives.table import OBJECTIVES, recognise_objective
from neobert.weights.describe import WeightsError
from neobert.weights.folder import (
    AVERAGE_FILE,
    EMA_FILE,
    HEAD_FILE,
    MANIFEST,
    MODEL_FILE,
    OBJECTIVE_KEY,
    STEPS_KEY,
    CheckpointError,
    find_checkpoint,
)
from neobert.weights.layouts import LAYOUTS, OTHER_ARCHITECTURES, TYPES, Layout, choose_neobert, to_ours
from neobert.weights.layouts.conversion import DECODER_BIASES

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model"]


class UnknownLayout(WeightsError):
    """An architecture that is none of ours: other libraries may load it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncoderWeights:
    """A trained encoder."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """On the host, by the names of `ObjectiveModule.state_dict()`, in the dtype of the file."""

    tokenizer: Path | None
    """A folder with tokenizer.json; None when there is none."""

    layout: str
    """Which of LAYOUTS the weights came in."""

    step: int | None
    """Optimizer steps of training, where that is known."""

    folder: Path
    """What was read."""

    kind: str = "model"
    """Which of WEIGHTS."""

    objective: str = MLM.name
    """A key of OBJECTIVES: what they were trained for, as far as the folder says."""

    training_only: dict[str, Tensor] = field(default_factory=dict)
    """What a checkpoint has beside `tensors`: a head or a temperature that only training has."""

    is_causal: bool = False
    """Whether they are those of a decoder."""

    notes: tuple[str, ...] = ()
    """What was changed on the way, for the log."""

    head: dict[str, Any] | None = None
    """What a checkpoint says of that head (`ObjectiveModule.describe_head`)."""


def load_encoder_weights(
    path: str | Path, *, drop_decoder_bias: bool = False, weights: str = "model", any_encoder: bool = False
) -> EncoderWeights:
    """The encoder at `path`: a checkpoint or run of ours or of the fork, an exported folder, or a model of the hub.

    Args:
        path: A folder, or a name of the hub.
        drop_decoder_bias: Leave out the bias of the vocabulary projection, if it has one.
        weights: A key of WEIGHTS.
        any_encoder: Read encoders of transformers too, as they are: `ModelConfig.hub_config` is then set.

    Raises:
        UnknownLayout: it is a model of transformers with another architecture.
        WeightsError: there is nothing at `path`, or it has no weights of that kind, or its tensors are not exactly
            those of an encoder of ours.
    """
    if weights not in WEIGHTS:
        raise WeightsError(f"weights: {weights!r} is unknown; write {' or '.join(WEIGHTS)}")
    folder = find_weights(path)
    try:
        if any_encoder and weights == "model" and (raw := _read_hub_config(folder)) is not None:
            return _read_hub_encoder(folder, raw)
        return _read_folder(folder, drop_decoder_bias, weights)
    except UnknownLayout as error:
        raise UnknownLayout(f"{folder}: {error}") from error
    except (OSError, ValueError, SafetensorError, yaml.YAMLError) as error:
        raise WeightsError(f"{folder}: {error}") from error


def find_weights(path: str | Path) -> Path:
    """The folder that holds the weights that `path` means.

    Raises:
        WeightsError: there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        if HUB_NAME.fullmatch(str(path)) and not folder.exists():
            return _fetch(str(path))
        raise WeightsError(
            f"{path} is no folder: give a run, a checkpoint, an exported model, or a name of the hub (owner/model)"
        )
    if (folder / "config.json").is_file():
        return folder
    foreign = _find_foreign_checkpoint(folder)
    if foreign is not None:
        return foreign
    try:
        found = find_checkpoint(folder)
    except CheckpointError as error:
        raise WeightsError(str(error)) from error
    if found is None:
        raise WeightsError(
            f"{folder} holds no weights: give a run folder (with checkpoints/<step>/ in it), one of its checkpoints, or"
            " a model folder with config.json"
        )
    return found


def _find_foreign_checkpoint(folder: Path) -> Path | None:
    """A checkpoint of the fork, or the last one of its run: with a config, and without our state."""
    candidates = [folder, *(p for p in (folder / "checkpoints").glob("*") if p.name.isdecimal())]
    foreign = [
        p
        for p in candidates
        if all((p / name).is_file() for name in ("config.yaml", "model.safetensors"))
        and not any((p / name).is_file() for name in ("train_state.json", MANIFEST))
    ]
    return max(foreign, key=lambda p: int(p.name) if p.name.isdecimal() else 0, default=None)


def _fetch(name: str) -> Path:
    repository, _, revision = name.partition("@")
    try:
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[*_SMALL_FILES, "*.safetensors"])
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repository, revision=revision or None, allow_patterns=[*_SMALL_FILES, "*.bin"])
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(
            f"{name} is no folder, and the hub did not give it: {reason}. Check the spelling and the connection, or"
            " download it and give the folder"
        ) from error
    return folder


_OURS = ("eurobert", "remote_code", "neobert")
"""Layouts that are read as encoders of ours wherever transformers has a class too."""


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers that its own class runs where nothing is trained: a decoder and a
    model of texts do more there than our encoder with their weights."""
    return _read_hub_config(folder) is not None


def _read_hub_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of an encoder of transformers; None where the folder holds one of ours."""
    file = folder / "config.json"
    if not file.is_file() or (folder / "model_config.json").is_file():
        return None
    raw: dict[str, Any] = parse_json(file.read_text())
    return None if TYPES.get(str(raw.get("model_type"))) in _OURS else raw


def _read_hub_encoder(folder: Path, raw: dict[str, Any]) -> EncoderWeights:
    if not (folder / "tokenizer.json").is_file():
        raise WeightsError(
            "there is no tokenizer.json; write it with AutoTokenizer.from_pretrained(...).save_pretrained(...) of "
            "transformers"
        )
    tokenizer = load_tokenizer(TokenizerSection(path=str(folder)))
    config = describe_backbone(raw, longest=tokenizer.longest, pad_token_id=tokenizer.pad_id)
    if tokenizer.size > config.vocab_size:
        raise WeightsError(f"its tokenizer has {tokenizer.size} tokens, its embedding {config.vocab_size} rows")
    weights = load_backbone(str(folder), raw)
    return EncoderWeights(
        config=config,
        tensors={f"encoder.{name}": tensor for name, tensor in weights.items()},
        tokenizer=folder,
        layout=str(raw["model_type"]),
        step=None,
        folder=folder,
    )


def _read_folder(folder: Path, drop_decoder_bias: bool, weights: str) -> EncoderWeights:
    tensors = _read_tensors(folder, WEIGHTS[weights])
    layout, raw = _recognise(folder, tensors)
    objective, training_only = _recognise_objective(raw), dict[str, Tensor]()
    if layout.name == "checkpoint":
        objective = _read_objective(folder, tensors, _step(folder, raw))
    if objective.training_only:
        training_only = {name: x for name, x in tensors.items() if name.startswith(objective.training_only)}
        tensors = {name: x for name, x in tensors.items() if name not in training_only}
    if layout.prefix is not None and not any(name.startswith(layout.prefix) for name in tensors):
        # AutoModel and sentence-transformers save the encoder alone. The config says whether a head is tied.
        tensors = {f"{layout.prefix}{name}": tensor for name, tensor in tensors.items()}
    config = layout.describe(raw, tensors)
    fitting, note = layout.prepare(raw, config, tensors)
    if layout.requires is not None:
        config = _restore(folder, config, tensors)
    if drop_decoder_bias:
        config = replace(config, decoder_bias=False)
    tokenizer = next((p for p in (folder, folder / "tokenizer") if (p / "tokenizer.json").is_file()), None)
    return EncoderWeights(
        config=config,
        tensors=to_ours(layout, config, fitting, drop_decoder_bias=drop_decoder_bias),
        tokenizer=tokenizer,
        layout=layout.name,
        step=_step(folder, raw),
        folder=folder,
        kind=weights,
        objective=objective.name,
        training_only=training_only,
        is_causal=layout.is_causal,
        notes=(note,) if note else (),
        head=parse_json((folder / HEAD_FILE).read_text()) if (folder / HEAD_FILE).is_file() else None,
    )


def _recognise_objective(raw: Mapping[str, Any]) -> Objective:
    """What an exported folder was trained for; those of models that fill masks say nothing."""
    name = str(raw.get(OBJECTIVE_KEY, MLM.name))
    if name not in OBJECTIVES:
        raise WeightsError(f"{OBJECTIVE_KEY}: {name!r} is unknown; known are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def _read_objective(folder: Path, tensors: Mapping[str, Tensor], step: int | None) -> Objective:
    """What a checkpoint was trained for up to its step: the names of its weights say it, or its config where none is
    of training only."""
    found, file = recognise_objective(tensors), folder / "config.yaml"
    if found.training_only or not file.is_file():
        return found
    config = load_plain_yaml(file.read_text(encoding="utf-8")) or {}
    if step is not None and step <= ((config.get("datacollator") or {}).get("clm_steps") or 0):
        return CLM
    named = OBJECTIVES.get(str((config.get("trainer") or {}).get("objective")), found)
    return found if named.training_only else named


def _recognise(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[Layout, Mapping[str, Any]]:
    if (folder / "config.json").is_file():
        raw = parse_json((folder / "config.json").read_text())
        kind = raw.get("model_type")
        if kind not in TYPES:
            reason = OTHER_ARCHITECTURES.get(str(kind))
            raise UnknownLayout(
                f"config.json has model_type {kind!r}: "
                + (reason or f"its layout is not known; known are {', '.join(sorted(TYPES))}")
            )
        return (choose_neobert(tensors) if TYPES[kind] == "neobert" else LAYOUTS[TYPES[kind]]), raw
    if (folder / "model_config.json").is_file():
        return LAYOUTS["checkpoint"], parse_json((folder / "model_config.json").read_text())
    raw = load_plain_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise WeightsError("config.yaml has no section `model`, so the architecture is not known")
    return choose_neobert(tensors), raw["model"]


def _restore(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """With what their config cannot hold (initial weights, dropout), from the file that our export writes."""
    if not (folder / "model_config.json").is_file():
        return config
    ours = ModelConfig.from_dict(parse_json((folder / "model_config.json").read_text()))
    carried = {"intermediate_size", "dropout_prob", "embedding_init_range", "decoder_init_range"}
    carried |= {"init", "init_std", "init_zero_residual"}
    if not config.decoder_bias and any(name in tensors for name in DECODER_BIASES):
        carried.add("decoder_bias")  # One of zeros: of other files it counts as none.
    both = replace(config, **{name: getattr(ours, name) for name in carried})
    if both != ours or both.ffn_size != config.ffn_size:
        raise WeightsError(
            "config.json and model_config.json describe different models; delete model_config.json, which only adds"
            " settings of training"
        )
    return ours


def _step(folder: Path, raw: Mapping[str, Any]) -> int | None:
    if (folder / "train_state.json").is_file():
        return int(parse_json((folder / "train_state.json").read_text())["step"])
    if (folder / AVERAGE_FILE).is_file():
        return int(max(parse_json((folder / AVERAGE_FILE).read_text())["steps"]))
    if STEPS_KEY in raw:
        return int(raw[STEPS_KEY])
    is_fork = folder.parent.name == "checkpoints" and folder.name.isdecimal()
    return int(folder.name) if is_fork else None


def _read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(parse_json(index.read_text())["weight_map"].values()))
        elif (folder / name).is_file():
            shards = [name]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if shard.endswith(".safetensors"):
                with safe_open(folder / shard, framework="pt") as file:
                    tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            else:
                tensors.update(_read_pickled(folder / shard))
        return tensors
    if EMA_FILE in names:
        raise WeightsError(
            f"there is no {EMA_FILE}: only checkpoints of runs with trainer.ema_decay have it, after "
            "trainer.ema_start_step; take the weights `model`"
        )
    raise WeightsError(f"there is neither {' nor '.join(names)}")


def _read_pickled(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_pickle(file)
    except UnreadablePickle as error:
        raise WeightsError(
            f"{file.name} cannot be read as tensors ({error}), and code in it is never run. Use the safetensors of "
            'this model, or make them where you trust whoever wrote the file: python -c "import torch; from '
            "safetensors.torch import save_file; "
            f"save_file(torch.load('{file.name}', weights_only=False), 'model.safetensors')\""
        ) from error
    return tensors


WEIGHTS: dict[str, tuple[str, ...]] = {"model": (MODEL_FILE, "pytorch_model.bin"), "ema": (EMA_FILE,)}
"""Which weights of a folder are meant: those that were trained, or their moving average. File names, first found."""


class UnreadablePickle(ValueError):
    """A pickle that is damaged or tries to run code; the message is the reason, without torch's advice."""


def load_pickle(path: Path, device: torch.device | str = "cpu") -> Any:
    """Tensors and plain values of a file of `torch.save`.

    Raises:
        FileNotFoundError: it is missing.
        UnreadablePickle: it is damaged, or names anything else than tensors and plain values.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        # Torch advises to load the file all the same, in several paragraphs.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}, which could be any code" if named else "it is no file of torch.save"
        raise UnreadablePickle(reason) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UnreadablePickle((str(error).strip() or type(error).__name__).split(". ")[0]) from error
