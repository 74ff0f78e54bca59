"""Ways in which an exported folder can be wrong and still load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def _edit_json(source: Path, target: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, target)
    values = json.loads((target / name).read_text())
    edit(values)
    (target / name).write_text(json.dumps(values))
    return target


def swap_queries_and_keys(source: Path, target: Path) -> Path:
    """The same scores but for the rotary planes' direction and the softmax's axis."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    q, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qv")
    tensors[q], tensors[v] = tensors[v].clone(), tensors[q].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def change_the_epsilon(source: Path, target: Path) -> Path:
    target = _edit_json(source, target, "config.json", lambda c: c.update(rms_norm_eps=1e-2))
    (target / "model_config.json").unlink()
    return target


def forget_the_template(source: Path, target: Path) -> Path:
    return _edit_json(source, target, "tokenizer.json", lambda c: c.update(post_processor=None))


def leave_the_space(source: Path, target: Path) -> Path:
    def edit(values: dict[str, Any]) -> None:
        (mask,) = [token for token in values["added_tokens"] if token["content"] == "[MASK]"]
        mask["lstrip"] = False

    return _edit_json(source, target, "tokenizer.json", edit)


def return_token_types(source: Path, target: Path) -> Path:
    return _edit_json(
        source, target, "tokenizer_config.json", lambda c: c["model_input_names"].append("token_type_ids")
    )


DAMAGES = {
    "swapped": swap_queries_and_keys,
    "epsilon": change_the_epsilon,
    "template": forget_the_template,
    "space": leave_the_space,
    "types": return_token_types,
}
