"""The tokenizer of an exported folder: called by itself, it must give exactly what the model was trained on.

Training wraps every document as `[CLS] text [SEP]`, whatever the tokenizer would do on its own, and a mask stands for a
word together with the space before it. Where the saved tokenizer differs, its template and its mask token are changed
accordingly; its vocabulary and the way it cuts text stay as they are.
"""

from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import AddedToken, AutoTokenizer


def save_tokenizer(source: Path, output: Path, *, max_length: int) -> list[str]:
    """Writes the tokenizer of `source` into `output`; returns a sentence for each change."""
    hf = AutoTokenizer.from_pretrained(str(source))
    hf.model_max_length = max_length
    hf.model_input_names = ["input_ids", "attention_mask"]
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
    return changes


def _plain(hf: Any, text: str) -> list[int]:
    return hf(text, add_special_tokens=False).input_ids


def _masks_leave_a_space(hf: Any) -> bool:
    return _plain(hf, f"a {hf.mask_token}") != [*_plain(hf, "a"), hf.mask_token_id]
