"""Weights of every family in and out: equal hidden states and logits, no tensor left over, errors that name it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, VOCAB, build_family
from safetensors.torch import load_file, save_file

from neobert.export.compare import build_model, our_states
from neobert.export.write import pad
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights, UnknownLayout, is_of_transformers, load_encoder_weights
from neobert.weights.layouts import LAYOUTS, from_ours

LENGTHS = (40, 23, 9, 1)
BOUND = 1e-5
DOCS = Path(__file__).parents[2] / "docs" / "export.md"


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def difference(weights: EncoderWeights, theirs: Any) -> float:
    """Largest of the last hidden states and logits, ours packed and theirs padded, relative where they exceed 1."""
    input_ids, mask = pad(documents(), 0)
    output = theirs(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
    largest = 0.0
    for row, ours in enumerate(our_states(build_model(weights), documents())):
        for mine, other in ((ours[-2], output.hidden_states[-1][row]), (ours[-1], output.logits[row])):
            error = (mine - other[: len(mine)]).abs().max() / max(1.0, float(mine.abs().max()))
            largest = max(largest, float(error))
    return largest


def write_back(weights: EncoderWeights, folder: Path) -> None:
    layout = LAYOUTS[weights.layout]
    assert layout.to_config is not None
    folder.mkdir()
    described = {"model_type": layout.name, **layout.to_config(weights.config), "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(described))
    save_file(from_ours(layout, weights.config, weights.tensors), folder / "model.safetensors", {"format": "pt"})


def measure(name: str, tmp_path: Path) -> tuple[float, float, list[str]]:
    """Largest difference in, and out, and the tensors that either side missed or had left over."""
    theirs = build_family(name)
    theirs.save_pretrained(tmp_path / "in")
    weights = load_encoder_weights(tmp_path / "in")
    write_back(weights, tmp_path / "out")
    back, loading = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    odd = [str(key) for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[keys]]
    return difference(weights, theirs), difference(weights, back.eval()), odd


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_a_family_comes_in_and_goes_out_unchanged(name: str, tmp_path: Path) -> None:
    came_in, went_out, odd = measure(name, tmp_path)
    print(f"| {name} | {came_in:.1e} | {went_out:.1e} | {len(odd)} |")  # For the table of docs/export.md.
    assert came_in <= BOUND
    assert went_out <= BOUND
    assert odd == []
    weights = load_encoder_weights(tmp_path / "in")
    assert weights.is_causal == name.startswith(("llama", "qwen3"))
    assert is_of_transformers(tmp_path / "in") != name.startswith("eurobert"), "what only training takes over"
    assert bool(weights.notes) == name.endswith("grouped keys")
    again = load_encoder_weights(tmp_path / "out")
    assert again.config == weights.config
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in weights.tensors.items())


@pytest.mark.parametrize("change", [{"local_rope_theta": None}, {"local_attention": 4}, {"rope_theta": 10000.5}])
def test_what_modernbert_adds_is_seen_by_the_comparison(change: dict[str, Any], tmp_path: Path) -> None:
    theirs = build_family("modernbert")
    theirs.save_pretrained(tmp_path)
    weights = load_encoder_weights(tmp_path)
    assert difference(replace(weights, config=replace(weights.config, **change)), theirs) > 100 * BOUND


def test_the_documents_list_every_family_within_the_bound() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.e-]+|0) \| ([\d.e-]+|0|-) \| 0 \|$", DOCS.read_text(), re.M)
    listed = {name for name, *_ in rows}
    assert listed == {*LAYOUTS} - {"checkpoint", "remote_code"}
    made = {name.partition(",")[0] for name in FAMILIES}
    assert listed - made == {"neobert", "neobert_fork"}, "those of test_layouts.py"
    assert all(float(number) <= BOUND for _, *both in rows for number in both if number != "-")


def test_the_heads_that_are_repeated_are_said(tmp_path: Path) -> None:
    build_family("llama, grouped keys").save_pretrained(tmp_path)
    weights = load_encoder_weights(tmp_path)
    assert weights.notes == ("its 2 heads of keys and values are repeated for 6 heads of queries",)
    keys = weights.tensors["encoder.layers.0.qkv.weight"].chunk(3)[1].view(6, 8, 48)
    assert torch.equal(keys[0], keys[2])
    assert not torch.equal(keys[2], keys[3])


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("modernbert", {"norm_bias": True}, "this ModernBERT model has another architecture.*norm_bias: True"),
        ("modernbert", {"hidden_activation": "relu"}, "hidden_activation: 'relu' cannot be expressed, only 'gelu'"),
        (
            "modernbert",
            {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            r"layer_types is \['sliding_attention'.*only layers 0, k, 2k, \.\.\. may read whole documents",
        ),
        ("llama, untied", {"num_key_value_heads": 4}, "this Llama model.*num_key_value_heads: 4 cannot be expressed"),
        ("llama, untied", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type: 'llama3' cannot be expressed"),
        ("llama, untied", {"attention_bias": True}, "attention_bias: True cannot be expressed"),
        (
            "llama, grouped keys",
            {"num_key_value_heads": 3},
            r"model.layers.0.self_attn.k_proj.weight has shape \[16, 48\] instead of \[24, 48\]",
        ),
        ("qwen3, grouped keys", {"head_dim": 16}, "head_dim: 16 cannot be expressed, only 8"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_key(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build_family(name).save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(WeightsError, match=re.compile(message, re.S)):
        load_encoder_weights(tmp_path)


@pytest.mark.parametrize("name", ["modernbert", "llama, grouped keys", "qwen3, grouped keys"])
def test_every_tensor_is_accounted_for(name: str, tmp_path: Path) -> None:
    build_family(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = sorted(key for key in tensors if ".layers.1." in key)[0]
    del tensors[lost]
    tensors["model.layers.2.extra.weight"] = torch.ones(2, 3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        load_encoder_weights(tmp_path)
    assert f"{lost} is missing, shape" in str(caught.value)
    assert "model.layers.2.extra.weight is not expected, shape [2, 3]" in str(caught.value)


def test_a_modernbert_without_its_head_is_read_without_one(tmp_path: Path) -> None:
    model = build_family("modernbert")
    model.model.save_pretrained(tmp_path)
    weights = load_encoder_weights(tmp_path)
    assert (weights.config.prediction_head, weights.config.decoder_bias) == (False, False)
    input_ids, mask = pad(documents(), 0)
    theirs = model.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    for row, ours in enumerate(our_states(build_model(weights), documents())):
        assert (ours[-2] - theirs[row, : len(ours[-2])]).abs().max() <= BOUND


def test_older_configs_of_modernbert_say_the_same(tmp_path: Path) -> None:
    """Those on the hub: a number instead of a list of kinds, two keys instead of a table of bases."""
    build_family("modernbert").save_pretrained(tmp_path)
    now = load_encoder_weights(tmp_path).config
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", "rope_parameters"):
        del config[key]
    older = {"global_attn_every_n_layers": 2, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config | older))
    assert load_encoder_weights(tmp_path).config == now
    assert (now.rope_theta, now.local_rope_theta, now.local_attention) == (160000.0, 10000.0, 8)
    rewrite(tmp_path, local_rope_theta=None)
    assert load_encoder_weights(tmp_path).config.local_rope_theta is None, "the base of all layers"


@pytest.mark.parametrize(("kind", "reason"), [("BertModel", "normalise their sum"), ("Qwen2Model", "Qwen 3")])
def test_other_architectures_are_refused_with_the_reason(kind: str, reason: str, tmp_path: Path) -> None:
    config = getattr(transformers, kind.replace("Model", "Config"))(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    with pytest.raises(UnknownLayout, match=reason):
        load_encoder_weights(tmp_path)
