"""Loading a model, and hidden states and embeddings of lists of texts."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import neobert
from neobert.commands.flags import build_model_parser, build_pairs_parser
from neobert.inference import model as loading
from neobert.inference.model import Model, choose_dtype
from neobert.inference.packed import hidden_states, plan_batches, token_losses
from neobert.inference.scorer import load_scorer
from neobert.model.attention import ATTENTION, choose_attention
from neobert.model.pooling import POOLING
from neobert.model.segments import Segments
from neobert.weights.describe import WeightsError

TEXTS = ["the cat sees the mountain.", "a dog", "", "every river builds a red door. my sister paints seven stones."]


def plain_hidden(model: Model, text: str) -> torch.Tensor:
    """One text through the encoder, by hand."""
    (ids,) = model.tokenizer.encode_batch([text])
    tokens = torch.tensor([[model.tokenizer.cls_id, *ids.tolist(), model.tokenizer.sep_id]])
    borders = torch.tensor([0, tokens.shape[1]], dtype=torch.int32)
    segments = Segments(
        ids=torch.ones_like(tokens), cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=tokens.shape[1]
    )
    with torch.no_grad():
        return model.module.encoder(tokens, torch.arange(tokens.shape[1])[None], segments)


def test_a_model_is_a_run_its_checkpoints_or_one_of_them(run_folder: Path, loaded: Model) -> None:
    for path in (run_folder, str(run_folder / "checkpoints"), run_folder / "checkpoints" / "12"):
        assert neobert.load(path, device="cpu").digest() == loaded.digest()
    assert loaded.max_length == 40
    assert loaded.hidden_size == 32
    assert not loaded.module.training


def test_errors_of_loading(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="holds no weights: give a run folder"):
        neobert.load(tmp_path)
    with pytest.raises(ValueError, match="dtype: 'fp8' is unknown; write one of auto, fp32, bf16"):
        neobert.load(run_folder, dtype="fp8")
    with pytest.raises(ValueError, match="device: 'gpu' is unknown; write auto, cpu, cuda or mps"):
        neobert.load(run_folder, device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: cuda is not here"):
        neobert.load(run_folder, device="cuda")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        neobert.lode  # noqa: B018


def test_importing_the_package_is_light() -> None:
    code = "import sys, neobert; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_hidden_states_are_those_of_each_text_alone(loaded: Model) -> None:
    for batch_tokens in (1, 20, 8192):
        states = loaded.hidden_states(TEXTS, batch_tokens=batch_tokens)
        assert len(states) == len(TEXTS)
        for text, hidden in zip(TEXTS, states):
            torch.testing.assert_close(hidden, plain_hidden(loaded, text), rtol=1e-4, atol=1e-5)
    assert loaded.hidden_states([]) == []
    assert not states[0].is_inference(), "a classifier can be trained on them"
    assert states[2].shape == (2, 32), "[CLS] and [SEP]"


@pytest.mark.parametrize("pooling", POOLING)
def test_embeddings_pool_the_hidden_states(loaded: Model, pooling: str) -> None:
    states = loaded.hidden_states(TEXTS)
    by_hand = {"mean": lambda h: h.mean(0), "max": lambda h: h.max(0).values, "cls": lambda h: h[0]}
    expected = torch.stack([by_hand[pooling](hidden) for hidden in states])
    for batch_tokens in (5, 8192):
        vectors = loaded.embed(TEXTS, pooling=pooling, batch_tokens=batch_tokens)
        torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    unit = loaded.embed(TEXTS, pooling=pooling, normalize=True)
    torch.testing.assert_close(unit, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert loaded.embed([], pooling=pooling).shape == (0, 32)


def test_an_unknown_pooling(loaded: Model) -> None:
    with pytest.raises(ValueError, match="pooling: 'avg' is unknown; write one of mean, cls, max"):
        loaded.embed(TEXTS, pooling="avg")


def test_long_texts_are_cut_with_a_warning(loaded: Model, caplog: pytest.LogCaptureFixture) -> None:
    long_text = "the cat sees " * 60
    with caplog.at_level(logging.WARNING):
        states = loaded.hidden_states([long_text, "a dog"])
    assert len(states[0]) == 40
    assert "1 of 2 texts are longer than the model (40 tokens) and were cut" in caplog.text
    documents, num_truncated = loaded.encode([long_text])
    assert num_truncated == 1
    assert documents[0][-1] == loaded.tokenizer.sep_id


def test_bf16_is_near_fp32(run_folder: Path, loaded: Model) -> None:
    half = neobert.load(run_folder, device="cpu", dtype="bf16")
    assert half.module.encoder.get_parameter("layers.0.qkv.weight").dtype == torch.bfloat16
    assert half.module.encoder.embedding.weight.dtype == torch.float32
    a, b = half.embed(TEXTS), loaded.embed(TEXTS)
    assert a.dtype == torch.float32
    difference = (a - b).abs().max().item()
    assert 0 < difference < 0.05 * b.abs().max().item()
    assert half.digest() != loaded.digest()


def test_batches_by_a_budget_of_tokens() -> None:
    assert plan_batches([3, 9, 4, 20], max_tokens=12) == [[3], [1], [2, 0]]
    assert plan_batches([5, 5, 5], max_tokens=10) == [[0, 1], [2]]
    assert plan_batches([], max_tokens=10) == []
    lengths = np.random.default_rng(0).integers(1, 60, size=200).tolist()
    plan = plan_batches(lengths, max_tokens=100)
    assert sorted(item for batch in plan for item in batch) == list(range(200))
    assert max(sum(lengths[item] for item in batch) for batch in plan) <= 100


def test_token_losses_leave_the_padding_of_the_vocabulary_out(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    size = loaded.tokenizer.size
    assert size < loaded.module.encoder.config.vocab_size
    hidden = hidden_states(loaded.module, loaded.encode(TEXTS).documents)
    targets = torch.arange(len(hidden)) % size
    logits = hidden @ loaded.module.head_weight.detach()[:size].T
    expected = -logits.log_softmax(-1)[torch.arange(len(hidden)), targets]
    monkeypatch.setattr("neobert.inference.packed.LOGITS_BYTES", 4 * size * 7)
    torch.testing.assert_close(token_losses(loaded.module, hidden, targets, size), expected, rtol=1e-4, atol=1e-5)
    assert len(token_losses(loaded.module, hidden[:0], targets[:0], size)) == 0


def test_the_module_has_its_older_name_too(loaded: Model) -> None:
    assert loaded.masked_lm is loaded.module
    assert loaded.module.encoder.attention is ATTENTION["sdpa"]


def test_few_shapes_are_multiplied(loaded: Model) -> None:
    """A long job on a CPU in bf16 keeps memory for each shape."""
    seen: list[int] = []
    hook = loaded.module.encoder.layers[0].qkv.register_forward_hook(lambda *args: seen.append(len(args[2])))
    try:
        states = [loaded.hidden_states(["a dog " * n])[0] for n in range(1, 12)]
    finally:
        hook.remove()
    assert len({len(hidden) for hidden in states}) == 11
    assert set(seen) == {64}


def test_matrix_products_are_bf16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention over all documents at once; fp32 where it is asked for, and on a CPU."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has_it=has_it: has_it)
        assert choose_dtype("auto", cuda) == expected
        assert choose_dtype("fp32", cuda) == torch.float32
        assert choose_dtype("auto", cpu) == torch.float32
        assert choose_dtype("bf16", cpu) == torch.bfloat16
    assert choose_attention("auto", device=cuda, dtype=torch.bfloat16, head_dim=64).name == "flash_attn_varlen"


def test_every_function_that_loads_takes_the_same_default(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands too; what was fp32 there is now the choice of the device."""
    asked: list[str] = []
    monkeypatch.setattr(loading, "choose_dtype", lambda dtype, device: asked.append(dtype) or torch.float32)
    neobert.load(run_folder)
    load_scorer(str(run_folder))
    for build in (build_model_parser, lambda *given: build_pairs_parser(*given, "", "")):
        actions = {action.dest: action for action in build("program", "")._actions}
        asked.append(actions["dtype"].default)
    assert asked == ["auto"] * 4
