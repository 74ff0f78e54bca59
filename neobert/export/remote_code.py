"""The remote-code form: the source files of `neobert/model` and `neobert/key.py`, copied but for two kinds of lines.

`from neobert.model.x import y` becomes `from .x import y`, which the loader of transformers follows from file to file.
And the name space of our torch operators becomes one of the module's own: two folders that are loaded into one process,
or a folder beside this package, would otherwise define the same operator twice, and the later definition would silently
replace the earlier one.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from neobert.data.tokenizer import Tokenizer
from neobert.export.choose import ExportError
from neobert.model import encoder
from neobert.model.config import ModelConfig
from neobert.weights.encoder_weights import REMOTE_CODE_TYPE
from neobert.weights.layouts import LAYOUTS, from_ours

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
    places = {MODELING: Path(__file__).with_name("modeling.py"), "key": model.with_name("key.py")}
    while waiting:
        name = waiting.pop()
        text = places.get(name, model / f"{name}.py").read_text(encoding="utf-8")
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
