"""From a folder of each family to a run and back to a folder: `model.init_from` alone says what is trained."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import build_family
from neobert_models import SIZES, hub_config, make_tensors
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from neobert.config.load import config_to_yaml, load_config, parse_config
from neobert.config.schema import Config
from neobert.data.tokenizer import train_tokenizer
from neobert.errors import StartupError
from neobert.export.write import ExportRequest, export
from neobert.model.config import ARCHITECTURE
from neobert.train.loop import pretrain
from neobert.weights.encoder_weights import is_of_transformers, load_encoder_weights

Tiny = Callable[..., Config]
NUM_TOKENS = 360


def save_decoder_tokenizer(folder: Path, texts: list[str]) -> None:
    """Byte-level BPE with the end of a text as its only special token, as GPT-2 and SmolLM2 have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end).save_pretrained(folder)


def make_source(name: str, folder: Path, texts: list[str]) -> None:
    if name == "neobert":
        folder.mkdir()
        tensors = make_tensors("hub")
        rows = {"model.encoder.weight", "decoder.weight", "decoder.bias"}
        padded = {
            key: torch.cat([x] * 13)[:NUM_TOKENS].contiguous() if key in rows else x for key, x in tensors.items()
        }
        save_file(padded, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(hub_config(vocab_size=NUM_TOKENS)))
    else:
        build_family(name).save_pretrained(folder)
    if name.startswith(("llama", "qwen3")):
        save_decoder_tokenizer(folder, texts)
    else:
        train_tokenizer(iter(texts), algorithm="byte_bpe", vocab_size=NUM_TOKENS).save(folder)


def from_source(tiny: Tiny, out: Path, source: Path, *overrides: str) -> Config:
    """The config of a run that says nothing about architecture, vocabulary and tokenizer but where they are."""
    tree = yaml.safe_load(config_to_yaml(tiny(out)))
    tree["model"] = {key: value for key, value in tree["model"].items() if key not in ARCHITECTURE}
    del tree["tokenizer"]
    short = ["trainer.max_steps=5", "trainer.eval_steps=5", "trainer.save_steps=0", "optimizer.lr=3e-3"]
    return parse_config(yaml.safe_dump(tree), [f"model.init_from={source}", *short, *overrides])


def evaluations(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    [
        ("eurobert, grouped keys", "native", "EuroBertForMaskedLM"),
        ("modernbert", "native", "ModernBertForMaskedLM"),
        ("llama, grouped keys", "native", "EuroBertForMaskedLM"),
        ("qwen3, grouped keys", "remote_code", "NeobertEncoderForMaskedLM"),
        ("neobert", "native", "EuroBertForMaskedLM"),
    ],
)
def test_init_from_alone_trains_and_exports(
    name: str, form: str, kind: str, tiny: Tiny, tmp_path: Path, texts: list[str], own_module_cache: None
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    make_source(name, source, texts)
    shorter = ["dataset.max_seq_length=16"] if name == "neobert" else []
    pretrain(from_source(tiny, run, source, *shorter))
    said = re.sub(r"\s+", " ", (run / "training.log").read_text())
    assert f"initial weights from {source}" in said
    assert ("heads of keys and values are repeated" in said) == name.endswith("grouped keys")
    is_decoder = name.startswith(("llama", "qwen3"))
    assert ("tokens are copied, 4 tokens that its tokenizer lacks start at their mean" in said) == is_decoder
    config = load_config(run / "config.yaml")
    assert config.tokenizer.path == str(source)
    assert config.model.hidden_size == (SIZES["hidden_size"] if name == "neobert" else 48)
    losses = evaluations(run)
    assert losses[-1] < losses[0]

    done = export(ExportRequest(source=str(run), output=tmp_path / "folder"))
    assert done.form == form
    theirs: Any = AutoModelForMaskedLM.from_pretrained(str(done.folder), trust_remote_code=form == "remote_code")
    assert type(theirs).__name__ == kind
    back, trained = load_encoder_weights(done.folder), load_encoder_weights(run)
    assert back.config.hidden_act == trained.config.hidden_act
    assert not is_of_transformers(done.folder), "one of ours, whatever its class"
    for key, tensor in trained.tensors.items():
        rows = len(back.tensors[key])  # Those that are no tokens are left out.
        assert torch.equal(back.tensors[key], tensor[:rows]), key


def test_a_resumed_run_needs_neither_source_nor_tokenizer(tiny: Tiny, tmp_path: Path, texts: list[str]) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    make_source("llama, grouped keys", source, texts)
    pretrain(from_source(tiny, run, source, "trainer.max_steps=2"))
    source.rename(tmp_path / "gone")
    pretrain(from_source(tiny, run, source, "trainer.max_steps=3", "trainer.resume_from_checkpoint=latest"))
    assert load_config(run / "config.yaml").tokenizer.path == str(source)
    assert load_encoder_weights(run).step == 3


def test_a_key_that_differs_names_both_values(tiny: Tiny, tmp_path: Path, texts: list[str]) -> None:
    source = tmp_path / "source"
    make_source("modernbert", source, texts)
    wrong = ["model.hidden_act=swiglu", "model.local_attention=16", "model.prediction_head=false"]
    with pytest.raises(StartupError) as caught:
        pretrain(from_source(tiny, tmp_path / "run", source, *wrong))
    message = str(caught.value)
    assert f"model.hidden_act: the config has 'swiglu', {source} has 'geglu'" in message
    assert f"model.local_attention: the config has 16, {source} has 8" in message
    assert f"model.prediction_head: the config has False, {source} has True" in message
    assert "hidden_size" not in message


def test_a_source_without_a_tokenizer_asks_for_one(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    build_family("modernbert").save_pretrained(source)
    with pytest.raises(StartupError, match=r"source has no tokenizer; name one with tokenizer.path"):
        pretrain(from_source(tiny, tmp_path / "run", source))
