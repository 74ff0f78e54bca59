"""A run of distillation, what it takes as a teacher, and everything that takes its checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_on
from records import exact_steps, log_lines
from safetensors.torch import load_file
from small_model import write_run
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import neobert
from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.config.schema_data import TokenizerSection
from neobert.data.tokenizer import load_tokenizer, train_tokenizer
from neobert.errors import StartupError
from neobert.export.write import ExportRequest, export
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
OBJECTIVE = "trainer.objective=distill"


@pytest.fixture(scope="module")
def teacher(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than its students."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
    return write_run(folder, tokenizer_folder, **sizes)


@pytest.fixture(scope="module")
def run(tiny: Tiny, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "run"
    pretrain(tiny(out, *keys_of(teacher), "model.dropout_prob=0.1", "trainer.max_steps=8"))
    return out


def keys_of(teacher: Path) -> list[str]:
    return [OBJECTIVE, f"distill.teacher={teacher}"]


def test_it_learns_what_the_teacher_says(run: Path) -> None:
    first, last = log_lines(run, "eval")[0], log_lines(run, "eval")[-1]
    assert last["divergence"] < first["divergence"]
    assert last["hidden_cosine"] > first["hidden_cosine"]
    assert 0 <= last["agreement"] <= 1
    text = (run / "training.log").read_text()
    assert "teacher   " in text
    assert "3 layers x 48" in text
    assert "teacher: same guess" in text


def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Tiny, teacher: Path, run: Path, tmp_path: Path) -> None:
    parts, keys = tmp_path / "parts", [*keys_of(teacher), "model.dropout_prob=0.1"]
    pretrain(tiny(parts, *keys, "trainer.max_steps=4", "scheduler.total_steps=8"))
    moved = tmp_path / "moved"
    moved.symlink_to(teacher)
    keys[1] = f"distill.teacher={moved}"
    pretrain(tiny(parts, *keys, "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest"))
    assert exact_steps(parts) == exact_steps(run)
    assert log_lines(parts, "eval") == log_lines(run, "eval")
    a, b = (load_file(x / "checkpoints/8/model.safetensors") for x in (run, parts))
    assert a.keys() == b.keys()
    assert {name for name in a if "teacher" in name} == {"teacher_projection.weight"}
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_teacher_is_declared(tiny: Tiny, run: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", tokenizer_folder, hidden_size=48, max_position_embeddings=64)
    branch = ["trainer.max_steps=9", f"trainer.resume_from_checkpoint={run / 'checkpoints' / '8'}"]
    keys = [*keys_of(other), "model.dropout_prob=0.1", *branch, "trainer.eval_strategy=no"]
    with pytest.raises(
        StartupError, match=r"(?s)distill.teacher +needs declaring +\"sha256:.*resume_allow=\[distill.teacher"
    ):
        pretrain(tiny(tmp_path / "refused", *keys))
    pretrain(tiny(tmp_path / "declared", *keys, "trainer.resume_allow=[distill.teacher]"))
    assert len(log_lines(tmp_path / "declared", "step")) == 1


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(tiny: Tiny, teacher: Path, tmp_path: Path, engine: str) -> None:
    keys = [*keys_of(teacher), "trainer.max_steps=2", "trainer.eval_steps=2", "trainer.save_model=false"]
    pretrain(tiny(tmp_path / "one", *keys))
    two = [*keys, "trainer.per_device_train_batch_size=2", "trainer.global_batch_size=4", f"trainer.parallel={engine}"]
    config = tiny(tmp_path / "two", *two)
    run_on(2, lambda: EXIT_CODES[pretrain(config).reason], tmp_path)
    one, both = (log_lines(tmp_path / x, "step") for x in ("one", "two"))
    assert [s["loss"] for s in both] == pytest.approx([s["loss"] for s in one], rel=1e-5)
    a, b = (log_lines(tmp_path / x, "eval")[-1] for x in ("one", "two"))
    assert (b["divergence"], b["hidden_cosine"]) == pytest.approx((a["divergence"], a["hidden_cosine"]), rel=1e-5)


def test_the_student_is_an_ordinary_masked_language_model(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    model = neobert.load(run, device="cpu")
    assert len(model.fill_mask(["the [MASK] house"])) == 1
    assert model.embed(["one", "two"]).shape == (2, 32)
    done = export(ExportRequest(source=str(run), output=tmp_path / "exported"))
    assert json.loads((done.folder / "config.json").read_text())["architectures"] == ["EuroBertForMaskedLM"]
    assert not any("teacher" in name for name in load_file(done.folder / "model.safetensors"))
    assert "distilled from a teacher: predictions at temperature 2" in (done.folder / "README.md").read_text()
    exported = neobert.load(done.folder, device="cpu")
    torch.testing.assert_close(exported.embed(["the old house"]), model.embed(["the old house"]))
    pretrain(tiny(tmp_path / "mlm", f"model.init_from={run}", "trainer.max_steps=1", "trainer.eval_strategy=no"))
    weights = load_file(tmp_path / "mlm/checkpoints/1/model.safetensors")
    assert not any("teacher" in name for name in weights)


def test_the_tokenizer_is_the_teachers_where_none_is_named(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    keys = [*keys_of(teacher), "tokenizer.path=null", "trainer.max_steps=1", "trainer.eval_strategy=no"]
    pretrain(tiny(tmp_path / "run", *keys, "trainer.bf16_residual=true", "trainer.mixed_precision=bf16"))
    assert "tokenizer" in (tmp_path / "run/config.yaml").read_text()
    assert len(log_lines(tmp_path / "run", "step")) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_position_embeddings": 40}, r"distill.teacher: .* reads at most 40 tokens.*max_seq_length = 64"),
        (
            {"max_position_embeddings": 64, "objective": "replaced_token"},
            r"distill.logits_weight: 1.0 needs a teacher that predicts hidden tokens.*write 0",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(
    tiny: Tiny, tokenizer_folder: Path, tmp_path: Path, settings: dict[str, object], sentence: str
) -> None:
    folder = write_run(tmp_path / "teacher", tokenizer_folder, **settings)
    with pytest.raises(StartupError, match=sentence):
        pretrain(tiny(tmp_path / "run", *keys_of(folder)))
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_no_teacher_and_another_tokenizer_are_named(
    tiny: Tiny, teacher: Path, tmp_path: Path, texts: list[str]
) -> None:
    with pytest.raises(StartupError, match=r"distill.teacher: .*nowhere is no folder"):
        pretrain(tiny(tmp_path / "run", *keys_of(tmp_path / "nowhere")))
    train_tokenizer(iter(texts), algorithm="byte_bpe", vocab_size=320).save(tmp_path / "other")
    with pytest.raises(StartupError, match=r"distill.teacher: .* has another tokenizer: \d+ of its 360 tokens"):
        pretrain(tiny(tmp_path / "run", *keys_of(teacher), f"tokenizer.path={tmp_path / 'other'}"))


def test_a_student_starts_from_layers_of_its_teacher(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    sizes = ["model.hidden_size=48", "model.num_hidden_layers=2"]
    start = [f"model.init_from={teacher}", "model.init_layers=[0,2]", "optimizer.lr=1e-9", "trainer.max_steps=1"]
    pretrain(tiny(tmp_path / "run", *keys_of(teacher), *sizes, *start, "trainer.eval_strategy=no"))
    assert "layers 0, 2 of 3" in (tmp_path / "run/training.log").read_text()
    theirs, ours = (
        load_file(x / "model.safetensors") for x in (teacher / "checkpoints/12", tmp_path / "run/checkpoints/1")
    )
    assert not any("teacher" in name for name in ours), "both have one width"
    torch.testing.assert_close(ours["encoder.layers.1.qkv.weight"], theirs["encoder.layers.2.qkv.weight"])
    with pytest.raises(StartupError, match=r"model.init_layers: \[5\]: the source has layers 0 to 2"):
        pretrain(tiny(tmp_path / "other", *sizes, f"model.init_from={teacher}", "model.init_layers=[5]"))


def save_of_transformers(model: Any, tokenizer_folder: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    load_tokenizer(TokenizerSection(path=str(tokenizer_folder))).save(folder)
    return folder


SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def test_an_encoder_of_transformers_teaches_its_hidden_states(
    tiny: Tiny, tokenizer_folder: Path, tmp_path: Path
) -> None:
    bert = save_of_transformers(BertModel(BertConfig(**SIZES)), tokenizer_folder, tmp_path / "bert")
    with pytest.raises(StartupError, match=r"distill.logits_weight: 1.0 needs a teacher that predicts hidden tokens"):
        pretrain(tiny(tmp_path / "run", *keys_of(bert)))
    pretrain(tiny(tmp_path / "run", *keys_of(bert), "distill.logits_weight=0", "trainer.max_steps=4"))
    first, *_, last = log_lines(tmp_path / "run", "eval")
    assert last["hidden_cosine"] > first["hidden_cosine"]
    assert last["agreement"] is None
    assert "same guess" not in (tmp_path / "run/training.log").read_text()


def test_a_decoder_is_no_teacher(tiny: Tiny, tokenizer_folder: Path, tmp_path: Path) -> None:
    llama = save_of_transformers(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer_folder, tmp_path / "llama")
    with pytest.raises(StartupError, match=r"distill.teacher: .* holds a decoder.*first with model.init_from"):
        pretrain(tiny(tmp_path / "run", *keys_of(llama)))
