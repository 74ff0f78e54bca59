"""Exports for other programs: what is refused before any work, what is written, and what those programs say of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from probes import forked_probes
from safetensors.torch import load_file
from small_model import write_run
from tokenizers import normalizers, pre_tokenizers
from variants import MODERNBERT

import neobert.export.opened as opened_module
from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import load_tokenizer, train_tokenizer
from neobert.export.compare import build_model, our_states, random_documents
from neobert.export.forms import ExportError
from neobert.export.gguf_file import GGUF_FILES, gguf_tensors, read_tensors, tokenizer_problem
from neobert.export.llama_folder import LLAMA_FOLDER
from neobert.export.onnx_file import INT8_FILE, ONNX_FILE, ONNX_PACKAGES, pool_padded
from neobert.export.opened import are_installed, open_files
from neobert.export.target_rows import TargetRow, build_reference, compare_tensors
from neobert.export.targets import TARGETS
from neobert.export.verify import verify
from neobert.export.write import Exported, ExportRequest, export, pad
from neobert.model.config import ModelConfig
from neobert.model.pooling import POOLING
from neobert.weights.encoder_weights import load_encoder_weights
from neobert.weights.folder import OBJECTIVE_KEY
from neobert.weights.vector_settings import POOLING_FILE, POOLING_KEYS, load_vector_settings

pytestmark = pytest.mark.usefixtures("own_module_cache")

needs_onnx = pytest.mark.skipif(not are_installed(ONNX_PACKAGES), reason="needs the extra onnx")
needs_gguf = pytest.mark.skipif(not are_installed(["gguf"]), reason="needs the extra gguf")
HEADS: dict[str, dict[str, Any]] = {
    "sequence_classification": {"kind": "classification", "pooling": "mean", "num_texts": 2},
    "token_classification": {"kind": "tokens", "pooling": "mean", "num_texts": 1},
}


@pytest.fixture(scope="module")
def wordpiece(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    train_tokenizer(iter(texts), "wordpiece", 200).save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tokenizer_folder: Path, wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    heads = {name: {"labels": ["cat", "dog", "house"], "max_length": 96, **head} for name, head in HEADS.items()}
    longer = {"max_position_embeddings": 96}
    return {
        "bpe": write_run(folder / "bpe", tokenizer_folder, tie_word_embeddings=False, **longer),
        "wordpiece": write_run(folder / "wordpiece", wordpiece, **longer),
        "norms": write_run(folder / "norms", tokenizer_folder, qk_norm=True),
        **{
            name: write_run(folder / name, tokenizer_folder, objective=name, head=head, **longer)
            for name, head in heads.items()
        },
    }


def for_vectors(run: Path, output: Path, pooling: str) -> Path:
    """The same encoder as a model of contrastive fine-tuning with this pooling."""
    export(ExportRequest(source=str(run), output=output))
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {OBJECTIVE_KEY: "contrastive"}))
    modes = json.loads((output / POOLING_FILE).read_text())
    modes |= {key: name == pooling for name, key in POOLING_KEYS.items()}
    (output / POOLING_FILE).write_text(json.dumps(modes))
    return output


def rows_of(done: Exported) -> dict[str, TargetRow]:
    return {row.target: row for row in done.rows}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("run", "request_", "said"),
    [
        ("bpe", {"targets": ("transformers", "onyx")}, "--for: 'onyx' is unknown; write one or more of transformers,"),
        ("norms", {"targets": ("vllm",)}, "--for: vllm: the folder has code of its own"),
        ("bpe", {"targets": ("vllm",), "form": "remote_code"}, "this takes the native form alone; leave it out"),
        ("token_classification", {"targets": ("vllm",)}, "--for: vllm: a head on labels has no counterpart in Llama"),
    ],
)
def test_a_target_that_cannot_be_made(
    runs: dict[str, Path], tmp_path: Path, run: str, request_: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError) as refused:
        export(ExportRequest(source=str(runs[run]), output=tmp_path / "new", **request_))
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_before_any_work(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = opened_module.importlib.util.find_spec
    monkeypatch.setattr(
        opened_module.importlib.util, "find_spec", lambda name: None if name in ("gguf", "onnxscript") else found(name)
    )
    assert call("export/export_hf.py", runs["bpe"], "--for", "gguf,onnx", "--output", tmp_path / "new") == 2
    said = capsys.readouterr().err
    assert "--for: gguf needs gguf, not installed here; pip install -e '.[gguf]', or leave it out" in said
    assert "--for: onnx needs" in said
    assert "onnxscript, not installed here; pip install -e '.[onnx]'" in said
    assert list(tmp_path.iterdir()) == []


@needs_gguf
def test_gguf_takes_no_head(runs: dict[str, Path], tmp_path: Path) -> None:
    request = ExportRequest(source=str(runs["token_classification"]), output=tmp_path / "new", targets=("gguf",))
    with pytest.raises(ExportError, match=r"--for: gguf: a head on labels has no counterpart in llama\.cpp"):
        export(request)


def test_tokenizers_that_llama_cpp_would_read_otherwise(tokenizer_folder: Path, wordpiece: Path) -> None:
    for folder in (tokenizer_folder, wordpiece):
        assert tokenizer_problem(load_tokenizer(TokenizerSection(path=str(folder)))) is None
    changed = load_tokenizer(TokenizerSection(path=str(tokenizer_folder)))
    changed._backend.normalizer = normalizers.NFKC()
    changed._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    problem = tokenizer_problem(changed)
    assert problem is not None
    assert "normalizer is 'NFKC' instead of None, add_prefix_space is True instead of False" in problem
    accents = load_tokenizer(TokenizerSection(path=str(wordpiece)))
    accents._backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    assert "strip_accents is False instead of True" in str(tokenizer_problem(accents))


# ---- what is written ----


@pytest.mark.parametrize("targets", [("transformers",), ("transformers", "sentence-transformers", "vllm")])
def test_the_folder_itself_is_the_same(runs: dict[str, Path], tmp_path: Path, targets: tuple[str, ...]) -> None:
    plain = export(ExportRequest(source=str(runs["wordpiece"]), output=tmp_path / "plain"))
    more = export(ExportRequest(source=str(runs["wordpiece"]), output=tmp_path / "more", targets=targets))
    assert plain.rows == ()
    for file in plain.folder.rglob("*"):
        if file.is_file() and file.name != "README.md":  # It has the folder's name.
            assert file.read_bytes() == (more.folder / file.relative_to(plain.folder)).read_bytes()
    added = {x.name for x in more.folder.iterdir()} - {x.name for x in plain.folder.iterdir()}
    assert added == ({LLAMA_FOLDER} if "vllm" in targets else set())


@pytest.mark.parametrize(("pooling", "theirs"), [("mean", "avg"), ("cls", "cls")])
def test_the_llama_config_is_the_same_function(
    runs: dict[str, Path], tmp_path: Path, pooling: str, theirs: str
) -> None:
    source = for_vectors(runs["bpe"], tmp_path / "source", pooling)
    done = export(ExportRequest(source=str(source), output=tmp_path / "out", targets=("vllm",)))
    row = rows_of(done)["vllm"]
    assert (row.passed, row.ids_equal, row.tokens_per_second) == (True, True, None)
    assert row.max_error < 1e-5
    assert row.opened_by.startswith("LlamaModel of transformers")
    config = json.loads((done.folder / LLAMA_FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaBidirectionalModel"]
    assert (config["model_type"], config["pooling"], config["is_causal"]) == ("llama", theirs, False)
    names = set(load_file(done.folder / LLAMA_FOLDER / "model.safetensors"))
    assert names == {x for x in load_file(done.folder / "model.safetensors") if not x.startswith("lm_head.")}
    maximum = for_vectors(runs["bpe"], tmp_path / "max", "max")
    with pytest.raises(ExportError, match=r"pools by mean and cls, and this model by max"):
        export(ExportRequest(source=str(maximum), output=tmp_path / "refused", targets=("vllm",)))


@needs_gguf
@pytest.mark.parametrize("run", ["bpe", "wordpiece"])
def test_gguf_holds_the_same_tensors(runs: dict[str, Path], tmp_path: Path, run: str) -> None:
    done = export(ExportRequest(source=str(runs[run]), output=tmp_path / "out", targets=("gguf",)))
    ours = gguf_tensors(load_encoder_weights(done.folder))
    largest = {}
    for kind, path in GGUF_FILES.items():
        theirs = read_tensors(done.folder / path)
        assert theirs.keys() == ours.keys()
        largest[kind] = max(float((ours[name] - x).abs().max()) for name, x in theirs.items())
    assert largest["f32"] == 0.0
    assert 0.0 < largest["f16"] < 1e-3
    assert largest["f16"] < largest["q8_0"] < 1e-2
    sizes = [(done.folder / path).stat().st_size for path in GGUF_FILES.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert {f"gguf {kind}" for kind in GGUF_FILES} <= set(rows_of(done))


@needs_gguf
@pytest.mark.llama_cpp
@pytest.mark.skipif(not are_installed(["llama_cpp"]), reason="needs llama-cpp-python")
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("run", ["bpe", "wordpiece"])
def test_llama_cpp_says_what_we_say(runs: dict[str, Path], tmp_path: Path, run: str, pooling: str) -> None:
    source = for_vectors(runs[run], tmp_path / "source", pooling)
    rows = rows_of(export(ExportRequest(source=str(source), output=tmp_path / "out", targets=("gguf",))))
    for kind in GGUF_FILES:
        row = rows[f"gguf {kind}"]
        assert row.opened_by.startswith("llama.cpp")
        assert (row.ids_equal, row.passed) == (True, True)
    assert rows["gguf f32"].relative_error < 1e-5
    assert rows["gguf q8_0"].cosine > 0.999


@pytest.fixture(scope="module")
def onnx(runs: dict[str, Path], own_module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    output = tmp_path_factory.mktemp("onnx") / "out"
    return export(ExportRequest(source=str(runs["bpe"]), output=output, targets=("onnx",)))


def check_onnx_rows(done: Exported) -> None:
    rows = rows_of(done)
    assert (rows["onnx fp32"].ids_equal, rows["onnx fp32"].passed) == (True, True)
    assert rows["onnx fp32"].tokens_per_second > 0
    assert 0.95 < rows["onnx int8"].cosine < 1
    assert rows["onnx int8"].num_bytes < rows["onnx fp32"].num_bytes
    assert rows["transformers"].passed


@needs_onnx
def test_onnx_gives_logits_of_the_vocabulary(onnx: Exported, runs: dict[str, Path], tmp_path: Path) -> None:
    check_onnx_rows(onnx)
    differs = shutil.copytree(onnx.folder, tmp_path / "differs")
    shutil.copyfile(differs / INT8_FILE, differs / ONNX_FILE)
    whole, broken = verify([(onnx.folder, str(runs["bpe"])), (differs, None)])
    assert whole.passed, whole.describe()
    assert {row.target for row in whole.rows} >= {"transformers", "onnx fp32", "onnx int8"}
    assert "| onnx int8 | onnxruntime" in whole.describe()
    assert not broken.passed
    assert "FAIL  onnx fp32: onnxruntime" in broken.describe()


@needs_onnx
@pytest.mark.parametrize("run", HEADS)
def test_onnx_gives_logits_of_labels(runs: dict[str, Path], tmp_path: Path, run: str) -> None:
    check_onnx_rows(export(ExportRequest(source=str(runs[run]), output=tmp_path / "out", targets=("onnx",))))


@needs_onnx
def test_onnx_gives_vectors_of_any_batch_and_length(runs: dict[str, Path], tmp_path: Path) -> None:
    import onnxruntime

    source = for_vectors(runs["wordpiece"], tmp_path / "source", "max")
    done = export(ExportRequest(source=str(source), output=tmp_path / "out", targets=("onnx",)))
    check_onnx_rows(done)
    session = onnxruntime.InferenceSession(done.folder / ONNX_FILE)
    assert [x.name for x in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    for shape in ((1, 1), (1, 40), (5, 2)):
        ids = torch.full(shape, 7).numpy()
        states, vectors = session.run(None, {"input_ids": ids, "attention_mask": (ids > 0).astype("int64")})
        assert (states.shape, vectors.shape) == ((*shape, 32), (shape[0], 32))


def write_modernbert(run: Path, tokenizer_folder: Path) -> Path:
    """A run of ModernBERT's layout that was never trained: the bias of its vocabulary is zeros."""
    settings = dict(word.removeprefix("model.").split("=") for word in MODERNBERT)
    values = {name: json.loads(value) if value != "geglu" else value for name, value in settings.items()}
    return write_run(run, tokenizer_folder, **values, max_position_embeddings=96)


def test_a_bias_of_zeros_is_read_back_as_one(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_modernbert(tmp_path / "run", tokenizer_folder)
    folder = export(ExportRequest(source=str(source), output=tmp_path / "out")).folder
    weights = load_encoder_weights(folder)
    assert weights.config.decoder_bias
    assert not weights.tensors["decoder_bias"].any()
    dropped = load_encoder_weights(folder, drop_decoder_bias=True)
    assert not dropped.config.decoder_bias
    assert "decoder_bias" not in dropped.tensors


@needs_onnx
def test_onnx_keeps_the_windows_of_modernbert(tokenizer_folder: Path, tmp_path: Path) -> None:
    import onnxruntime

    source = write_modernbert(tmp_path / "run", tokenizer_folder)
    done = export(ExportRequest(source=str(source), output=tmp_path / "out", targets=("onnx",)))
    check_onnx_rows(done)
    weights = load_encoder_weights(done.folder)
    documents = random_documents(96, 200)
    tokenizer = load_tokenizer(TokenizerSection(path=str(done.folder)))
    ids, mask = pad(documents, tokenizer.pad_id)
    session = onnxruntime.InferenceSession(done.folder / ONNX_FILE)
    (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    theirs = [torch.from_numpy(row[: len(document)]) for row, document in zip(logits, documents)]

    def compare(config: ModelConfig) -> dict[str, Any]:
        states = our_states(build_model(replace(weights, config=config)), documents)
        return compare_tensors([(x[-1], found) for x, found in zip(states, theirs)], None)

    assert compare(weights.config)["passed"]
    for other in (4, 6, 10, None):
        assert compare(replace(weights.config, local_attention=other))["relative_error"] > 1e-3, other


# ---- 16 bits ----


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_loss_of_16_bits_is_said(
    runs: dict[str, Path], tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export/export_hf.py", runs["bpe"], "--dtype", dtype, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"{dtype} against fp32, random tokens: largest difference of a logit " in said
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {expected}
    with forked_probes():
        (verdict,) = verify([(tmp_path / "out", str(runs["bpe"]))])
    assert verdict.passed, verdict.describe()


def test_fp16_refuses_what_it_cannot_hold(runs: dict[str, Path], tokenizer_folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", tokenizer_folder, embedding_init_range=1e5)
    with pytest.raises(ExportError, match=r"--dtype: fp16 cannot hold the weights of encoder\.embedding\.weight"):
        export(ExportRequest(source=str(run), output=tmp_path / "out", dtype="fp16"))


# ---- how they are compared ----


def test_rows_compare_what_they_say(runs: dict[str, Path], tmp_path: Path) -> None:
    one = torch.tensor([3.0, 4.0])
    same = compare_tensors([(one, one)], None)
    assert same == {"max_error": 0.0, "relative_error": 0.0, "cosine": pytest.approx(1.0), "passed": True}
    half = compare_tensors([(one, one), (one, torch.tensor([3.0, 4.5]))], None)
    assert (half["max_error"], half["relative_error"], half["passed"]) == (0.5, 0.125, False)
    assert compare_tensors([(one, torch.tensor([3.0, 4.5]))], 0.99)["passed"]
    assert not compare_tensors([(one, torch.tensor([float("nan"), 4.0]))], 0.99)["passed"]
    assert not compare_tensors([(one, one[:1])], 0.0)["passed"]

    folder = export(ExportRequest(source=str(runs["bpe"]), output=tmp_path / "out")).folder
    weights = load_encoder_weights(folder)
    tokenizer = load_tokenizer(TokenizerSection(path=str(folder)))
    reference = build_reference(weights, tokenizer, load_vector_settings(weights))
    assert all(row.passed for row in open_files(folder, reference))
    other = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(other))
    row = next(row for row in open_files(folder, reference) if row.target == "transformers")
    assert (row.ids_equal, row.passed) == (False, False)


@pytest.mark.parametrize("pooling", POOLING)
def test_padded_pooling_is_the_packed_one(pooling: str) -> None:
    states, lengths = torch.randn(3, 5, 4), torch.tensor([5, 2, 1])
    mask = (torch.arange(5) < lengths[:, None]).long()
    packed = POOLING[pooling](states[mask == 1], lengths)
    torch.testing.assert_close(pool_padded(states, mask, pooling), packed)


def test_the_table_of_targets_is_what_help_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export/export_hf.py", "--help") == 0
    assert ", ".join(TARGETS) in " ".join(capsys.readouterr().out.split())
