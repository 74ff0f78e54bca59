"""Encoders of transformers in our loop: the hidden states that they have alone, and runs that resume exactly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)

import neobert
from neobert.config.load import ConfigError
from neobert.config.schema import Config, TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import StartupError
from neobert.export.write import ExportError, ExportRequest, export
from neobert.finetune.job import finetune, read_evaluations
from neobert.inference.packed import hidden_states
from neobert.model.attention import ATTENTION
from neobert.model.hub_encoder import build_encoder_of, plan_rows
from neobert.objectives.base import ObjectiveModule
from neobert.objectives.classification import HeadInfo, SequenceClassifier
from neobert.objectives.labelled_rows import encode_rows
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import load_encoder_weights

Labelled = Callable[..., Config]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = ("bert", "roberta", "modernbert")
UNSET = [
    "model.hidden_size=768",
    "model.num_hidden_layers=12",
    "model.num_attention_heads=12",
    "model.intermediate_size=3072",
    "model.max_position_embeddings=1024",
]
"""The defaults of what `labelled` sets: the encoder decides."""


@pytest.fixture(scope="module")
def hub_folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models in the layout of the hub, each with random weights and a tokenizer whose pairs look as its own do."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        if kind == "roberta":
            ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=ends
            )
        tokenizer.save_pretrained(folder)
        common = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(1)
        if kind == "bert":
            model: Any = BertModel(BertConfig(**common, max_position_embeddings=48))
        elif kind == "roberta":
            model = RobertaModel(RobertaConfig(**common, max_position_embeddings=48, type_vocab_size=1))
        else:
            ids = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
            model = ModernBertModel(ModernBertConfig(**common, **ids))
        for name, weight in model.named_parameters():
            if "norm" not in name.lower():
                torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_pairs_have_the_hidden_states_of_transformers(hub_folders: dict[str, Path], kind: str) -> None:
    folder = hub_folders[kind]
    weights = load_encoder_weights(folder, any_encoder=True)
    module = ObjectiveModule(build_encoder_of(weights.config, ATTENTION["sdpa"]))
    module.load_state_dict(weights.tensors, strict=True)
    module.eval()
    tokenizer, theirs = load_tokenizer(TokenizerSection(path=str(folder))), AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    rows = [("a short text",), ("one text of a pair", "and the other"), ("the cat sees a dog and follows the bird",)]
    encoded = encode_rows(tokenizer, rows, 48)
    documents = [np.array([tokenizer.cls_id, *ids, tokenizer.sep_id], dtype=np.int32) for ids in encoded.tokens]
    ours = hidden_states(module, documents).split([len(ids) for ids in documents])
    for row, ids, hidden in zip(rows, documents, ours):
        inputs = theirs(*row, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids.tolist()
        if kind == "bert":
            types = [0] * (len(theirs(row[0])["input_ids"])) + [1] * len(ids)
            inputs["token_type_ids"] = torch.tensor([types[: len(ids)]])
        else:
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_it_learns_resumes_exactly_and_answers(
    labelled: Labelled, hub_folders: dict[str, Path], labelled_files: Path, tmp_path: Path, kind: str
) -> None:
    out, resumed = tmp_path / "whole", tmp_path / "resumed"
    keys = [f"finetune.model={hub_folders[kind]}", f"dataset.path={labelled_files}/pairs.jsonl", "optimizer.lr=1e-3"]
    result = finetune(labelled(out, *keys, *UNSET, "finetune.layer_lr_decay=0.9"))
    finetune(
        labelled(
            resumed, *keys, *UNSET, "finetune.layer_lr_decay=0.9", f"trainer.resume_from_checkpoint={out}/checkpoints/4"
        )
    )
    assert read_evaluations(resumed)[-1] == read_evaluations(out)[-1]
    rows = [json.loads(line) for line in (labelled_files / "pairs.jsonl").read_text().splitlines()]
    model = neobert.load(out / "checkpoints" / str(result.best_step))
    answers = model.predict([f"{row['sentence1']}\t{row['sentence2']}" for row in rows])
    right = [answer.label == row["label"] for answer, row in zip(answers, rows)]  # type: ignore[attr-defined]
    assert sum(right) > 0.4 * len(rows)
    with pytest.raises(ValueError, match="is one text, but the model was trained on pairs"):
        model.predict(["one text"])
    with pytest.raises(ExportError, match=rf"has an encoder of transformers \({kind}\)"):
        export(ExportRequest(source=str(out), output=tmp_path / "exported"))


def test_other_uses_of_such_a_folder_are_refused(
    labelled: Labelled, hub_folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match=r"model.hidden_size: the config has 32, .* has 16"):
        finetune(labelled(tmp_path / "x", f"finetune.model={hub_folders['bert']}"))
    with pytest.raises(ValueError, match="model_type 'bert': its blocks normalise their sum"):
        neobert.load(hub_folders["bert"])


def test_weights_that_a_file_lacks_are_an_error_and_not_random(hub_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(hub_folders["bert"], folder)
    tensors = {name: x for name, x in load_file(folder / "model.safetensors").items() if "layer.1." not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"its weights lack .*layer\.1\..*, which its config.json describes"):
        load_encoder_weights(folder, any_encoder=True)


def test_frozen_layers_hold_the_tables_of_the_embeddings(hub_folders: dict[str, Path]) -> None:
    found = load_encoder_weights(hub_folders["bert"], any_encoder=True)
    head = HeadInfo(kind="classification", labels=("a", "b"), pooling="mean", max_length=32)
    module = SequenceClassifier(build_encoder_of(found.config, ATTENTION["sdpa"]), head)
    module.freeze_first(1)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert not [name for name in trained if "layer.0." in name or name.endswith("_embeddings.weight")]
    assert [name for name in trained if "layer.1." in name]


@pytest.mark.parametrize("key", ["trainer.fp8=emulated", "trainer.bf16_residual=true"])
def test_keys_about_blocks_of_ours_are_refused(
    labelled: Labelled, hub_folders: dict[str, Path], tmp_path: Path, key: str
) -> None:
    name = key.split("=")[0]
    with pytest.raises((StartupError, ConfigError), match=rf"{name}: .* is for encoders of ours"):
        finetune(
            labelled(
                tmp_path / "x", f"finetune.model={hub_folders['bert']}", key, *UNSET, "trainer.mixed_precision=bf16"
            )
        )


def test_rows_of_a_batch_are_few_groups_without_its_padding() -> None:
    lengths = [40, 8, 9, 300, 290, 3]
    borders = torch.tensor([0, *np.cumsum(lengths)])
    is_text = torch.ones(sum(lengths), dtype=torch.bool)
    is_text[-3:] = False
    groups, place = plan_rows(borders, is_text, shortest=0.75)
    # 300 and 290 are alike; the rest is too little for a product of its own kind each.
    assert [tuple(group.shape) for group in groups] == [(2, 300), (3, 40)]
    slots = torch.cat([group.flatten() for group in groups])
    assert slots[place[:-3]].tolist() == list(range(sum(lengths) - 3))
    assert not (slots >= sum(lengths) - 3).any()
