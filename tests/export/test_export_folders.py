"""What an export writes, and that everything wrong is said before anything is written."""

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from variants import EXPORTS

import neobert.export.write as write_module
from neobert.config.schema import Config
from neobert.data.tokenizer import train_tokenizer
from neobert.export.forms import CARRIED, REQUIRED, ExportError, choose_form, code_files
from neobert.export.tokenizer_files import save_tokenizer
from neobert.export.write import Exported, ExportRequest, export
from neobert.model.config import ModelConfig
from neobert.objectives.base import VectorSettings
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import load_encoder_weights
from neobert.weights.vector_settings import load_vector_settings

Tiny = Callable[..., Config]

SMALL = ModelConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=8,
    vocab_size=4,
    pad_token_id=0,
)


def test_native_whenever_the_architecture_allows_it() -> None:
    assert choose_form(SMALL, "auto") == choose_form(SMALL, "native") == "native"
    assert choose_form(SMALL, "remote_code") == "remote_code"
    variants = ({"rope": False}, {"rms_norm": False}, {"hidden_act": "gelu"}, {"qk_norm": True}, {"ngpt": True})
    for change in (*variants, {"embedding_norm": True}, {"decoder_bias": True}, {"local_attention": 4}):
        assert choose_form(replace(SMALL, **change), "auto") == "remote_code"
    with pytest.raises(ExportError, match=r"native cannot express .*model.rope: False instead of True; model.rms_norm"):
        choose_form(replace(SMALL, rope=False, rms_norm=False), "native")
    assert choose_form(replace(SMALL, init="megatron", init_std=0.1, init_zero_residual=True), "auto") == "native"
    with pytest.raises(ExportError, match="'onnx' is unknown; write auto, native or remote_code"):
        choose_form(SMALL, "onnx")


def test_a_field_of_the_architecture_that_nobody_thought_of_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(ModelConfig):
        softcap: float = 30.0

    with pytest.raises(ExportError, match=r"does not know the architecture fields softcap"):
        choose_form(Later(**SMALL.to_dict()), "auto")
    assert not CARRIED & set(REQUIRED)
    assert {f.name for f in fields(SMALL)} == CARRIED | set(REQUIRED)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_folder_is_complete_and_can_be_read_back(
    name: str, exports: dict[str, Exported], runs: dict[str, Path]
) -> None:
    run, _, dtype = EXPORTS[name]
    done = exports[name]
    assert done.form == ("native" if name.startswith("native") else "remote_code")
    assert (done.step, not done.folder.with_name(f".tmp-{name}").exists()) == (8, True)
    files = {path.name for path in done.folder.iterdir()}
    code = {"model_config.json"} if done.form == "native" else set(code_files())
    common = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    common |= {"training_proof.json"}
    assert files == common | code | {"modules.json", "sentence_bert_config.json", "1_Pooling"}
    with safe_open(done.folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    stored = torch.float32 if dtype == "fp32" else torch.bfloat16
    back, source = load_encoder_weights(done.folder), load_encoder_weights(runs[run])
    assert {tensor.dtype for tensor in back.tensors.values()} == {stored}
    assert (back.step, back.tokenizer) == (8, done.folder)
    size = json.loads((source.folder / "tokenizer_info.json").read_text())["vocab_size"]
    assert size < source.config.vocab_size, "rows that are no tokens"
    assert back.config == replace(source.config, vocab_size=size)
    for key, tensor in source.tensors.items():
        vocabulary = ("encoder.embedding.weight", "decoder.weight", "decoder_bias", "logit_scale")
        rows = size if key in vocabulary else len(tensor)
        assert torch.equal(back.tensors[key], tensor[:rows].to(stored))


@pytest.mark.parametrize("name", EXPORTS)
def test_the_tokenizer_gives_what_the_model_takes_and_files_tell_nothing_of_this_machine(
    name: str, exports: dict[str, Exported]
) -> None:
    folder = exports[name].folder
    session = str(folder.parents[1])  # All files that tests make are somewhere in it.
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"is_local", "local_files_only", "name_or_path", "tokenizer_file"} & set(values)
    assert sorted(AutoTokenizer.from_pretrained(str(folder))("a text")) == ["attention_mask", "input_ids"]
    for file in (path for path in folder.rglob("*") if path.suffix in (".json", ".md")):
        assert session not in file.read_text(), file


def test_files_can_be_read_by_everybody(runs: dict[str, Path], tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        done = export(ExportRequest(source=str(runs["learned"]), output=tmp_path / "out"))
    finally:
        os.umask(umask)
    for path in (done.folder, *done.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    checkpoint = runs["learned"] / "checkpoints"
    assert {stat.S_IMODE(path.stat().st_mode) for path in checkpoint.rglob("*") if path.is_file()} == {0o644}


def test_export_of_an_export_is_the_same_file(exports: dict[str, Exported], tmp_path: Path) -> None:
    for name in ("native", "learned"):
        again = export(ExportRequest(source=str(exports[name].folder), output=tmp_path / name))
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
            assert (again.folder / file).read_bytes() == (exports[name].folder / file).read_bytes()


def test_the_files_of_sentence_transformers(exports: dict[str, Exported]) -> None:
    folder = exports["native"].folder
    modules = json.loads((folder / "modules.json").read_text())
    assert [(m["idx"], m["path"], m["type"].rsplit(".", 1)[1]) for m in modules] == [
        (0, "", "Transformer"),
        (1, "1_Pooling", "Pooling"),
    ]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens"]
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 64


@pytest.mark.parametrize("name", ["native", "native_untied", "remote", "remote_untied"])
def test_an_encoder_saved_without_its_head(exports: dict[str, Exported], tmp_path: Path, name: str) -> None:
    AutoModel.from_pretrained(exports[name].folder, trust_remote_code=True).save_pretrained(tmp_path / "alone")
    if name.endswith("untied"):
        with pytest.raises(WeightsError, match=r"layout:\n  (lm_head|decoder).weight is missing, shape \[\d+, \d+\]$"):
            load_encoder_weights(tmp_path / "alone")
        return
    whole, alone = load_encoder_weights(exports[name].folder), load_encoder_weights(tmp_path / "alone")
    assert alone.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(tensor, whole.tensors[key]) for key, tensor in alone.tensors.items())


def test_an_export_with_other_sentence_files_is_exported_again(exports: dict[str, Exported], tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(exports["native"].folder, folder)
    (folder / "sentence_bert_config.json").unlink()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    again = export(ExportRequest(source=str(folder), output=tmp_path / "again")).folder
    assert json.loads((again / "sentence_bert_config.json").read_text())["max_seq_length"] == 64
    pooling = json.loads((again / "1_Pooling" / "config.json").read_text())
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_cls_token"]
    for content, said in (
        ('{"pooling_mode_lasttoken": true}', r"1_Pooling/config.json: the pooling must be one of cls, mean, max"),
        ("{", r"1_Pooling/config.json cannot be read \(.*\); correct it"),
        ("[]", r"1_Pooling/config.json is no JSON object; correct it"),
    ):
        (folder / "1_Pooling" / "config.json").write_text(content)
        with pytest.raises(ExportError, match=said):
            export(ExportRequest(source=str(folder), output=tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_the_files_that_sentence_transformers_6_saves(exports: dict[str, Exported], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(exports["native"].folder, folder)
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "max"}')
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "feature-extraction"}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"document": "", "query": "q: "}}')
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 32}))
    assert load_vector_settings(load_encoder_weights(folder)) == VectorSettings(
        max_length=32, pooling="max", prompts=(("query", "q: "),)
    )


def test_the_card_says_how_the_model_was_trained(exports: dict[str, Exported], runs: dict[str, Path]) -> None:
    card = (exports["native"].folder / "README.md").read_text()
    records = [json.loads(line) for line in (runs["tied"] / "log.jsonl").read_text().splitlines()]
    tokens = sum(r["num_tokens"] for r in records if r["kind"] == "step")
    loss = [r for r in records if r["kind"] == "eval"][-1]["loss"]
    for expected in (
        "| layers x width x heads | 2 x 32 x 2 |",
        "| vocabulary | 360 tokens, tied to the embedding |",
        "- optimizer steps: 8",
        f"- tokens seen: {tokens:,}",
        f"- held-out loss at step 8: {loss:.4f} nats",
        "- adamw, peak learning rate 0.01, cosine schedule",
        'AutoModelForMaskedLM.from_pretrained("native")',
        "# license: yours to choose",
    ):
        assert expected in card
    assert str(runs["tied"].parent) not in card, "no path of this machine"
    assert "trust_remote_code" not in card
    assert "- weight decay 0.1, seed 3, 4 rows a step" in card
    assert f"- versions: torch {version('torch')}, " in card
    remote = (exports["learned"].folder / "README.md").read_text()
    assert 'from_pretrained("learned", trust_remote_code=True)' in remote
    assert "| positions | learned |" in remote
    norms, biased, ngpt = ((exports[n].folder / "README.md").read_text() for n in ("norms", "biased", "ngpt"))
    assert "RMSNorm, before each half of a block, after the embedding, RMSNorm of queries and keys |" in norms
    assert "360 tokens, tied to the embedding, with a bias |" in biased
    assert "| norm | none: hidden states and the vectors of all matrices have length 1 (nGPT" in ngpt


def test_the_code_in_a_folder_is_that_of_the_model_and_needs_nothing_of_ours() -> None:
    files = code_files()
    package = Path(write_module.__file__).parents[1]
    assert {"modeling_neobert_encoder.py", "encoder.py", "attention.py", "config.py", "key.py"} <= set(files)
    for name, text in files.items():
        assert "from neobert" not in text
        assert "import neobert" not in text
        if name != "modeling_neobert_encoder.py" and "_OPERATORS" not in text:
            source = (package / ("" if name == "key.py" else "model") / name).read_text()
            assert text == re.sub(r"from neobert\.(model\.)?", "from .", source), "verbatim"


def test_everything_wrong_is_said_together_and_nothing_is_written(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    request = ExportRequest(
        source=str(runs["learned"]),
        output=tmp_path / "taken",
        form="native",
        dtype="int4",
        push_to_hub="name",
        language=("en", "english"),
    )
    with pytest.raises(ExportError) as caught:
        export(request)
    for expected in (
        "--output: ",
        "--dtype: 'int4'",
        "--push-to-hub: 'name'",
        "--format: native cannot express",
        "--language: 'english' is no language code",
    ):
        assert expected in str(caught.value)
    with pytest.raises(ExportError) as caught:
        export(ExportRequest(source="/nowhere", output=tmp_path / "new", dtype="int8"))
    assert "/nowhere is no folder" in str(caught.value)
    assert "'int8'" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.filterwarnings("ignore:.*has no manifest.json")
def test_a_checkpoint_without_its_tokenizer_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    newest = runs["tied"] / "checkpoints" / "8"
    for name in ("model_config.json", "model.safetensors", "train_state.json"):
        (tmp_path / name).symlink_to(newest / name)
    with pytest.raises(ExportError, match=r"has no tokenizer \(tokenizer.json\); put it into its folder tokenizer/"):
        export(ExportRequest(source=str(tmp_path), output=tmp_path / "out"))
    train_tokenizer(iter(["a b c d e f g " * 60]), "byte_bpe", 262).save(tmp_path / "tokenizer")
    assert load_encoder_weights(tmp_path).tokenizer == tmp_path / "tokenizer"
    many = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    train_tokenizer(iter([" ".join(many)] * 3), "byte_bpe", 500).save(tmp_path / "tokenizer")
    with pytest.raises(ExportError, match=r"has 500 tokens, its embedding 384 rows"):
        export(ExportRequest(source=str(tmp_path), output=tmp_path / "out"))


def test_a_model_that_disagrees_is_not_kept(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_module.native_tensors

    def wrong(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = real(config, tensors)
        result["model.norm.weight"] = result["model.norm.weight"] * 1.01
        return result

    monkeypatch.setattr(write_module, "native_tensors", wrong)
    with pytest.raises(ExportError, match=r"does not match ours(.|\n)*last hidden state differs by"):
        export(ExportRequest(source=str(runs["tied"]), output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


class FakeHub:
    """Replaces huggingface_hub.HfApi."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fails = False

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))

    def upload_folder(self, **options: Any) -> None:
        if self.fails:
            raise ConnectionError("no token")
        self.calls.append(("upload", options))


def test_upload_to_the_hub(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "HfApi", FakeHub)
    done = export(ExportRequest(source=str(runs["tied"]), output=tmp_path / "out", push_to_hub="me/encoder"))
    (name, created), (_, uploaded) = FakeHub.calls
    assert (name, created) == ("me/encoder", {"exist_ok": True})
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/encoder", str(done.folder))
    assert 'from_pretrained("me/encoder")' in (done.folder / "README.md").read_text()
    monkeypatch.setattr(FakeHub, "fails", True)
    request = ExportRequest(source=str(runs["tied"]), output=tmp_path / "kept", push_to_hub="me/encoder")
    with pytest.raises(ExportError, match=r"me/encoder was not uploaded \(no token\); .*kept is complete"):
        export(request)
    assert (tmp_path / "kept" / "config.json").is_file()


def test_a_tokenizer_with_another_template_is_fixed(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    train_tokenizer(iter(["the old house stands here " * 20]), "wordpiece", 60).save(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(values))
    changes = save_tokenizer(folder, tmp_path / "fixed", max_length=20)
    assert changes == ["the tokenizer now writes [CLS] text [SEP], as in training"]
    fixed = AutoTokenizer.from_pretrained(str(tmp_path / "fixed"))
    tokens = fixed.convert_ids_to_tokens(fixed("the [MASK] house").input_ids)
    assert tokens == ["[CLS]", "the", "[MASK]", "house", "[SEP]"]
    assert (fixed.model_max_length, sorted(fixed("a"))) == (20, ["attention_mask", "input_ids"])


@pytest.mark.parametrize("name", ["remote", "biased", "ngpt"])
def test_a_model_with_its_own_code_trains_is_resized_and_saved(
    name: str, exports: dict[str, Exported], tmp_path: Path
) -> None:
    options = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForMaskedLM.from_pretrained(str(exports[name].folder), **options).eval()
    assert model.decoder.weight is model.get_input_embeddings().weight, "tied"
    ids = torch.tensor([[2, 50, 60, 3], [2, 70, 3, 0]])
    mask = (ids != 0).long()
    labels = torch.where(ids == 50, 50, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    expected = -output.logits[0, 1].log_softmax(-1)[50]
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    output.loss.backward()
    assert model.model.encoder.layers[0].qkv.weight.grad.abs().sum() > 0
    assert model(ids, attention_mask=mask, return_dict=False)[0].equal(output.logits)
    model.resize_token_embeddings(400)
    assert model(ids, attention_mask=mask).logits.shape == (2, 4, 400)
    model.save_pretrained(str(tmp_path / "saved"))
    again = AutoModelForMaskedLM.from_pretrained(str(tmp_path / "saved"), **options).eval()
    assert torch.allclose(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits, atol=1e-6)
    assert load_encoder_weights(tmp_path / "saved").config.vocab_size == 400
    with pytest.raises(ValueError, match=r"attention_mask: shape \[1, 1, 2, 4\] for tokens \[2, 4\]"):
        model(ids, attention_mask=torch.ones(1, 1, 2, 4))


@pytest.mark.parametrize("name", ["native", "gelu_layernorm", "ngpt"])
def test_a_classifier_of_tokens_trains_and_is_saved(name: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    options = {"trust_remote_code": name != "native"}
    model = AutoModelForTokenClassification.from_pretrained(str(exports[name].folder), num_labels=5, **options).eval()
    ids = torch.tensor([[2, 50, 60, 3], [2, 70, 3, 0]])
    labels = torch.tensor([[-100, 4, 1, -100], [-100, 0, -100, -100]])
    output = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
    assert output.logits.shape == (2, 4, 5)
    kept = labels != -100
    expected = torch.nn.functional.cross_entropy(output.logits[kept], labels[kept])
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    output.loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.save_pretrained(str(tmp_path / "tagger"))
    again = AutoModelForTokenClassification.from_pretrained(str(tmp_path / "tagger"), **options).eval()
    assert again(input_ids=ids, attention_mask=(ids != 0).long()).logits.equal(output.logits)


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
@pytest.mark.parametrize("name", ["remote", "gelu_layernorm", "ngpt"])
def test_gradient_checkpointing_computes_blocks_again_and_the_same_gradients(
    name: str, exports: dict[str, Exported]
) -> None:
    model = AutoModelForMaskedLM.from_pretrained(
        str(exports[name].folder), trust_remote_code=True, dtype=torch.float32
    ).train()
    ids = torch.tensor([[2, 50, 60, 3], [2, 70, 3, 0]])
    calls: list[int] = []
    model.model.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[list[torch.Tensor], int]:
        model.zero_grad()
        calls.clear()
        labels = torch.where(ids > 3, ids, -100)
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters()], len(calls)

    plain, once = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    checkpointed, twice = gradients()
    assert (once, twice) == (1, 2)
    assert all(a.equal(b) for a, b in zip(plain, checkpointed, strict=True))
    model.gradient_checkpointing_disable()
    assert gradients()[1] == 1


@pytest.mark.parametrize("name", ["native", "gelu_layernorm"])
def test_a_classifier_on_top_trains(name: str, exports: dict[str, Exported]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        str(exports[name].folder), trust_remote_code=name != "native", num_labels=3
    )
    ids = torch.tensor([[2, 50, 60, 3], [2, 70, 3, 0]])
    output = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.tensor([2, 0]))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([2, 0]))
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    output.loss.backward()


def test_a_text_longer_than_the_learned_positions_is_an_error(exports: dict[str, Exported]) -> None:
    folder = str(exports["learned"].folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="longer than the 64 positions"):
        model(torch.ones(1, 65, dtype=torch.long))
    left = torch.tensor([[0] * 30 + [2] + [50] * 40])
    assert model(left, attention_mask=(left != 0).long()).logits.isfinite().all(), "padding takes no positions"


def test_the_operators_of_two_folders_do_not_replace_each_other(exports: dict[str, Exported]) -> None:
    options = {"trust_remote_code": True, "dtype": torch.float32}
    first = AutoModelForMaskedLM.from_pretrained(str(exports["remote"].folder), **options)
    second = AutoModelForMaskedLM.from_pretrained(str(exports["learned"].folder), **options)
    operators = {
        sys.modules[type(m).__module__.rsplit(".", 1)[0] + ".segmented"].segmented_attention._qualname
        for m in (first, second)
    }
    assert len(operators) == 2
    assert not any(name.startswith("neobert::") for name in operators)


def test_bytes_of_the_tied_head_are_stored_once(exports: dict[str, Exported]) -> None:
    assert "lm_head.weight" not in load_file(exports["native"].folder / "model.safetensors")
    assert "lm_head.weight" in load_file(exports["native_untied"].folder / "model.safetensors")
    assert SimpleNamespace(**json.loads((exports["native"].folder / "config.json").read_text())).dtype == "float32"
