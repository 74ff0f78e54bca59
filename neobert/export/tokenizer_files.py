"""The tokenizer of an exported folder: called by itself, it must give exactly what the model was trained on.

Training wraps every document as `[CLS] text [SEP]`, whatever the tokenizer would do on its own, and a mask replaces a
word together with the space before it. Where the saved tokenizer differs, its template and its mask token are changed
accordingly; its vocabulary and the way it cuts text stay as they are. The class that tokenizer_config.json names is
kept while transformers makes of it what tokenizer.json says.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import AddedToken

from neobert.data.tokenizer_file import CONFIG_FILE, OWN_CLASS, load_as_written

INPUTS = ["input_ids", "attention_mask"]
"""What an exported model takes. A tokenizer's class may add token types, which no encoder of ours knows."""

_OF_LOADING = ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys that transformers keeps of how a tokenizer was loaded here."""


def save_tokenizer(source: Path, output: Path, *, max_length: int) -> list[str]:
    """Writes the tokenizer of `source` into `output`; returns a sentence for each change."""
    hf = load_as_written(str(source)).hf
    hf.model_max_length = max_length
    hf.model_input_names = INPUTS
    hf.padding_side = hf.truncation_side = "right"
    changes = []
    if hf("a").input_ids != [hf.cls_token_id, *_plain(hf, "a"), hf.sep_token_id]:
        cls, sep = hf.cls_token, hf.sep_token
        hf.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, hf.cls_token_id), (sep, hf.sep_token_id)],
        )
        changes.append(f"the tokenizer now writes {cls} text {sep}, as in training")
    if _masks_leave_a_space(hf):
        hf.add_special_tokens({"mask_token": AddedToken(hf.mask_token, lstrip=True, special=True)})
        changes.append(f"{hf.mask_token} takes the space before it along, as in training")
    hf.save_pretrained(str(output))
    _write_config(output / "tokenizer_config.json")
    return changes


def _write_config(file: Path) -> None:
    """Writes down the inputs, which transformers does only where they were set before, and drops what is not about
    the tokenizer."""
    values = {
        key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key not in _OF_LOADING
    }
    values["model_input_names"] = INPUTS
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def check_class(folder: Path) -> list[str]:
    """Sees to it that plain `AutoTokenizer` tokenises as tokenizer.json says, in a folder that has its config.json.

    Where the class in tokenizer_config.json makes another tokenizer of it, the class that reads the file as it is takes
    it; a sentence says so.
    """
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    named = config.get("tokenizer_class")
    note = load_as_written(str(folder)).note
    if note is None and named != "TokenizersBackend":  # Of transformers 5 alone, for the same class.
        return []
    file.write_text(
        json.dumps(config | {"tokenizer_class": OWN_CLASS}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return [] if note is None else [f"the tokenizer's class is {OWN_CLASS}, not {named}: {note}"]


def _plain(hf: Any, text: str) -> list[int]:
    return hf(text, add_special_tokens=False).input_ids


def _masks_leave_a_space(hf: Any) -> bool:
    return _plain(hf, f"a {hf.mask_token}") != [*_plain(hf, "a"), hf.mask_token_id]
