"""The forms an encoder is exported in: which one, its config and its tensors.

`native` is an architecture that transformers ships: EuroBERT (RMSNorm before each half of a block, rotary positions,
SwiGLU, no biases, attention in both directions) or ModernBERT, which a run has that continued one. An encoder of ours
with the settings of one of them is the same function, so its folder loads with plain `AutoModel` classes. `remote_code`
is for everything else: the folder carries the code of `neobert/model` and `neobert/key.py`, copied but for two kinds of
lines, and needs `trust_remote_code=True`. `from neobert.model.x import y` becomes `from .x import y`, which the loader
of transformers follows from file to file. And the name space of our torch operators becomes one of the module's own:
two folders that are loaded into one process, or a folder beside this package, would otherwise define the same operator
twice, and the later definition would silently replace the earlier one.

Every field of ModelConfig is in one of two tables: here, or in what EuroBERT's layout requires. A field that is in
neither is an error: a new setting must not be dropped on the way out because nobody thought of it here.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from neobert.data.tokenizer import Tokenizer
from neobert.errors import UserError
from neobert.model import encoder
from neobert.model.config import ModelConfig
from neobert.weights.layouts import LAYOUTS, Layout, from_ours
from neobert.weights.layouts.own import REMOTE_CODE_TYPE

Form = Literal["native", "remote_code"]


class ExportError(UserError, ValueError):
    """An export that cannot be made or is not exact; the message names every reason."""


CARRIED = frozenset(
    {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "vocab_size",
        "pad_token_id",
        "rope_theta",
        "dropout_prob",
        "norm_eps",
        "embedding_init_range",
        "decoder_init_range",
        "tie_word_embeddings",
        "global_attention_every",
        "init",
        "init_std",
        "init_zero_residual",
        "base_scale",
    }
)
"""Fields that the native form holds, that do nothing but in training (dropout, initial weights), or that do nothing
where the fields below have their values."""

NATIVE = {layout.name: layout for layout in LAYOUTS.values() if layout.requires is not None}
"""Layouts of the native form, the first that holds an architecture counts."""

REQUIRED: Mapping[str, Any] = LAYOUTS["eurobert"].requires or {}
"""Fields that EuroBERT has only one value for."""


def choose_family(config: ModelConfig) -> tuple[Layout, list[str]]:
    """The native layout that is nearest to an architecture, and what of the architecture it cannot express."""
    problems = {
        name: [
            f"model.{field}: {getattr(config, field)!r} instead of {value!r}"
            for field, value in (layout.requires or {}).items()
            if getattr(config, field) != value
        ]
        for name, layout in NATIVE.items()
    }
    nearest = min(problems, key=lambda name: len(problems[name]))
    return NATIVE[nearest], problems[nearest]


def choose_form(config: ModelConfig, requested: str) -> Form:
    """`requested`, where `auto` is `native` whenever the architecture allows it.

    Raises:
        ExportError: `native` cannot express the architecture, `requested` is unknown, or ModelConfig has a field that
            this module does not know.
    """
    unknown = [f.name for f in fields(config) if f.name not in CARRIED and f.name not in REQUIRED]
    if unknown:
        raise ExportError(
            f"--format: the export does not know the architecture fields {', '.join(unknown)}; say in CARRIED or "
            "neobert/export/forms.py or in `requires` of the layouts whether EuroBERT and ModernBERT can express them"
        )
    if requested not in ("auto", "native", "remote_code"):
        raise ExportError(f"--format: {requested!r} is unknown; write auto, native or remote_code")
    _, problems = choose_family(config)
    if requested == "native" and problems:
        raise ExportError(
            f"--format: native cannot express this architecture ({'; '.join(problems)}); write auto or remote_code"
        )
    return "remote_code" if problems or requested == "remote_code" else "native"


def native_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str, *, fills_masks: bool = True) -> dict[str, Any]:
    """The contents of config.json; `dtype` is torch's name of the dtype of the weights."""
    family, _ = choose_family(config)
    assert family.to_config is not None, "a native layout is written"
    return {
        "architectures": [f"{family.classes}{'ForMaskedLM' if fills_masks else 'Model'}"],
        "model_type": family.name,
        "dtype": dtype,
        **family.to_config(config),
        **{key: tokenizer.roles[role] for key, role in family.token_ids.items()},
        "classifier_pooling": "mean",
    }


def native_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of their family."""
    return from_ours(choose_family(config)[0], config, tensors)


MODELING = "modeling_neobert_encoder"
"""Name of the module with transformers' classes."""

_IMPORT = re.compile(r"^from neobert\.(?:model\.)?(\w+) import ", re.M)
_OPERATOR = re.compile(r'"neobert::(\w+)"')
_NAMESPACE = """import zlib as _zlib

_OPERATORS = f"neobert_{_zlib.crc32(__name__.encode()):08x}"
"""


def code_files() -> dict[str, str]:
    """File name to source of everything that the folder needs.

    Raises:
        ExportError: the model's code imports something of this package that is not copied.
    """
    sources, waiting = {}, [MODELING]
    model = Path(encoder.__file__).parent
    files = {MODELING: Path(__file__).with_name("modeling.py"), "key": model.with_name("key.py")}
    while waiting:
        name = waiting.pop()
        text = files.get(name, model / f"{name}.py").read_text(encoding="utf-8")
        waiting += [other for other in _IMPORT.findall(text) if f"{other}.py" not in sources and other not in waiting]
        sources[f"{name}.py"] = _relocate(name, text)
    return sources


def _relocate(name: str, text: str) -> str:
    text = _IMPORT.sub(r"from .\1 import ", text)
    if _OPERATOR.search(text):
        text = _OPERATOR.sub(r'f"{_OPERATORS}::\1"', text)
        # After the imports: the docstring and `from __future__` lines must stay first.
        last = [m.start() for m in re.finditer(r"^(?:from|import) .*$", text, re.M)][-1]
        text = text[:last] + _NAMESPACE + text[last:]
    leftover = re.search(r"^\s*(?:from|import) neobert\b.*$|torch\.ops\.neobert\b", text, re.M)
    if leftover is not None:
        raise ExportError(f"--format: remote_code cannot take {name}.py along, it has `{leftover.group().strip()}`")
    return text


def remote_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str, *, fills_masks: bool = True) -> dict[str, Any]:
    """The contents of config.json; `dtype` is torch's name of the dtype of the weights."""
    classes = {"AutoConfig": "NeobertEncoderConfig"}
    for head in ("", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"):
        classes[f"AutoModel{head}"] = f"NeobertEncoder{head or 'Model'}"
    return {
        "architectures": [f"NeobertEncoder{'ForMaskedLM' if fills_masks else 'Model'}"],
        "auto_map": {auto: f"{MODELING}.{kind}" for auto, kind in classes.items()},
        "model_type": REMOTE_CODE_TYPE,
        "dtype": dtype,
        "architecture": config.to_dict(),
        "attn_backend": "sdpa",
        "classifier_pooling": "mean",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.cls_id,
        "eos_token_id": tokenizer.sep_id,
    }


def remote_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of the classes in `modeling.py`."""
    return from_ours(LAYOUTS["remote_code"], config, tensors)
