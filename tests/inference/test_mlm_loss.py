"""MLM loss: as in the evaluation of training, as through transformers, and by words."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, EuroBertForMaskedLM

from neobert.benchmark.inference import build_padded, compare
from neobert.config.schema import Config
from neobert.data.tokenizer import Tokenizer, train_tokenizer
from neobert.errors import DataError
from neobert.inference.mlm_loss import LossSettings, MlmLoss, choose_words, mlm_loss, tokens_of_words
from neobert.inference.model import Model
from neobert.inference.scorer import BatchLoss, OwnScorer, Scorer, load_scorer
from neobert.inference.texts import open_texts
from neobert.train.loop import pretrain
from neobert.types import PackedBatch


def run(scorer: Scorer, source: Path, **settings: object) -> MlmLoss:
    with open_texts(str(source)) as texts:
        return mlm_loss(scorer, texts, LossSettings(**settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def native(loaded: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a folder of transformers."""
    folder = tmp_path_factory.mktemp("native")
    encoder = build_padded(loaded)
    encoder.config.tie_word_embeddings = True
    model = EuroBertForMaskedLM(encoder.config)
    model.model.load_state_dict(encoder.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    loaded.tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def bert(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody else's model: another architecture, another tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_tokenizer(iter(texts), algorithm="wordpiece", vocab_size=90)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=48,
        pad_token_id=tokenizer.pad_id,
        initializer_range=0.5,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_the_loss_is_that_of_the_evaluation_of_training(
    tiny: Callable[..., Config], tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neobert.inference.mlm_loss._BLOCK_DOCUMENTS", 7)
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=2", "trainer.eval_seed=5", "dataset.eval_samples=40"))
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if record["kind"] == "eval"][-1]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = run(load_scorer(str(out)), held_out, seed=5, max_documents=40)
    assert result.num_targets == evaluated["num_targets"]
    assert result.num_documents == 40
    assert result.loss == pytest.approx(evaluated["loss"], rel=1e-5)
    assert result.accuracy == pytest.approx(evaluated["accuracy"], rel=1e-6)
    # As in training, a document too short to use has no number and changes no mask.
    held_out.write_text('{"text": "a"}\n' + held_out.read_text())
    again = run(load_scorer(str(out)), held_out, seed=5, max_documents=40)
    assert (again.num_targets, again.num_documents) == (result.num_targets, 40)
    assert again.loss == pytest.approx(result.loss, rel=1e-6)
    assert run(load_scorer(str(out)), held_out, seed=6, max_documents=40).loss != pytest.approx(result.loss, rel=1e-4)


def test_the_same_model_through_transformers_has_the_same_loss(loaded: Model, native: Path, jsonl: Path) -> None:
    for settings in ({}, {"mask_all": True, "mlm_probability": 0.4}, {"max_length": 17}, {"whole_words": True}):
        if "whole_words" in settings:
            settings["piece_chars"] = 60
        ours = run(OwnScorer(loaded), jsonl, **settings)
        theirs = run(load_scorer(str(native)), jsonl, **settings)
        assert theirs.num_targets == ours.num_targets
        assert theirs.num_tokens == ours.num_tokens
        assert theirs.loss == pytest.approx(ours.loss, abs=1e-5)
        assert theirs.accuracy == ours.accuracy
        assert theirs.num_words == ours.num_words


def test_truncated_documents_are_scored_to_the_limit(loaded: Model, tmp_path: Path, texts: list[str]) -> None:
    """As if the text ended there: the same masks, whatever is after the limit."""
    limit = 20
    (ids,) = loaded.tokenizer.encode_batch([text for text in texts if len(text) > 400][:1])
    short = loaded.tokenizer.decode(ids[: limit - 2].tolist())
    assert np.array_equal(loaded.tokenizer.encode_batch([short])[0], ids[: limit - 2])
    losses = []
    for name, text in (("long", loaded.tokenizer.decode(ids.tolist())), ("short", short)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        losses.append(run(OwnScorer(loaded), tmp_path / f"{name}.jsonl", max_length=limit, truncate=True))
    assert losses[0].num_tokens == losses[1].num_tokens == limit
    assert losses[0].loss == losses[1].loss
    assert run(OwnScorer(loaded), tmp_path / "long.jsonl", max_length=limit).num_tokens > 3 * limit
    with pytest.raises(ValueError, match="--truncate"):
        LossSettings(truncate=True, whole_words=True)


def test_batches_do_not_change_the_loss(loaded: Model, native: Path, jsonl: Path) -> None:
    for scorer in (OwnScorer(loaded), load_scorer(str(native))):
        losses = [run(scorer, jsonl, batch_tokens=tokens).loss for tokens in (1, 100, 8192)]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_another_tokenizer_is_asked_for_the_same_words(
    loaded: Model, bert: Path, jsonl: Path, texts: list[str]
) -> None:
    settings = {"whole_words": True, "piece_chars": 60, "mlm_probability": 0.2}
    ours, theirs = run(OwnScorer(loaded), jsonl, **settings), run(load_scorer(str(bert)), jsonl, **settings)
    assert (theirs.num_words, theirs.num_bytes) == (ours.num_words, ours.num_bytes)
    assert theirs.num_targets != ours.num_targets
    assert ours.num_words is not None
    assert ours.num_bytes is not None
    assert ours.num_words == pytest.approx(0.2 * sum(len(text.split()) for text in texts[:30]), rel=0.25)
    bits = ours.loss * ours.num_targets / math.log(2) / ours.num_bytes
    assert ours.bits_per_byte == pytest.approx(bits)
    assert f"{ours.bits_per_byte:.4f} bits per byte of" in ours.describe()


def test_the_loss_of_others_against_a_loop(bert: Path, tmp_path: Path) -> None:
    """Every token masked, one document: what the model says, by hand."""
    (tmp_path / "one.jsonl").write_text('{"text": "the cat sees a red door."}\n')
    result = run(load_scorer(str(bert)), tmp_path / "one.jsonl", mask_all=True, mlm_probability=1.0)
    scorer = load_scorer(str(bert))
    (ids,) = scorer.tokenizer.encode_batch(["the cat sees a red door."])
    model = BertForMaskedLM.from_pretrained(bert).eval()
    masked = [scorer.tokenizer.cls_id, *[scorer.tokenizer.mask_id] * len(ids), scorer.tokenizer.sep_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([masked])).logits[0, 1:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids).long())
    assert result.num_targets == len(ids)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)


def test_words_are_chosen_by_their_position_in_the_text() -> None:
    settings = LossSettings(mlm_probability=0.5, seed=3)
    text = " ".join(f"word{n}" for n in range(200))
    chosen = choose_words(text, 7, 0, settings)
    assert 70 < len(chosen) < 130
    assert all(text[begin:end].startswith("word") for begin, end in chosen)
    cut = text.index("word100")
    parts = choose_words(text[:cut], 7, 0, settings) + [
        (begin + cut, end + cut) for begin, end in choose_words(text[cut:], 7, cut, settings)
    ]
    assert parts == chosen, "however the document is cut"
    assert choose_words(text, 8, 0, settings) != chosen


def test_the_tokens_of_the_chosen_words_are_the_targets(loaded: Model, tmp_path: Path) -> None:
    class Recorder(OwnScorer):
        def score(self, batch: PackedBatch) -> BatchLoss:
            targets.extend(batch.targets[: batch.num_targets].tolist())
            inputs.extend(batch.input_ids.flatten()[batch.masked_index[: batch.num_targets]].tolist())
            return super().score(batch)

    targets: list[int] = []
    inputs: list[int] = []
    text = "every river builds the open sea and a broken clock remembers seven stones"
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    result = run(Recorder(loaded), tmp_path / "one.jsonl", whole_words=True, mlm_probability=0.4)
    chosen = choose_words(text, 0, 0, LossSettings(mlm_probability=0.4))
    assert result.num_words == len(chosen) > 1
    assert loaded.tokenizer.decode(targets).split() == [text[begin:end] for begin, end in chosen]
    assert set(inputs) == {loaded.tokenizer.mask_id}


def test_tokens_of_words(loaded: Model) -> None:
    offsets = np.array([[0, 3], [3, 5], [5, 9], [9, 10]])
    assert tokens_of_words(offsets, [(4, 9)]).tolist() == [1, 2]
    assert tokens_of_words(offsets, [(0, 3), (9, 10)]).tolist() == [0, 3]
    text = "the machine paints é"
    ((ids, offsets),) = loaded.tokenizer.encode_with_offsets([text])
    assert ids.tolist() == loaded.tokenizer.encode_batch([text])[0].tolist()
    hidden = tokens_of_words(offsets, [(4, 11)])
    assert loaded.tokenizer.decode(ids[hidden]).strip() == "machine"


def test_errors(loaded: Model, native: Path, jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither a checkpoint nor a config\.json"):
        load_scorer(str(tmp_path))
    with pytest.raises(DataError, match="is no checkpoint of ours, and transformers cannot load it"):
        load_scorer(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"characters have \d+ tokens, and the model takes 40; .*--piece-chars \d+"):
        run(OwnScorer(loaded), jsonl, whole_words=True)
    with pytest.raises(DataError, match="has no document of 100000 tokens or more to mask"):
        run(OwnScorer(loaded), jsonl, min_length=100_000)
    for name, value in {"mlm_probability": 0.0, "max_length": 2, "max_documents": 0}.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: {value}"):
            LossSettings(**{name: value})  # type: ignore[arg-type]
    config = BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "headless")
    Tokenizer(load_scorer(str(native)).tokenizer._hf).save(tmp_path / "headless")
    with pytest.raises(DataError, match="lacks weights of a masked language model"):
        load_scorer(str(tmp_path / "headless"))
    maskless = tmp_path / "maskless"
    BertForMaskedLM(config).save_pretrained(maskless)
    hf = load_scorer(str(native)).tokenizer._hf
    hf.mask_token = None
    hf.save_pretrained(maskless)
    with pytest.raises(DataError, match="its tokenizer has no mask token; name a model that was trained with masks"):
        load_scorer(str(maskless))


def test_the_benchmark_compares_equal_models(loaded: Model, texts: list[str]) -> None:
    first, *speeds = compare(loaded, texts[:40], batch_tokens=500, rows=8, repeats=1)
    assert float(first.rsplit(" ", 1)[1]) < 1e-4
    assert [line.split(":")[0] for line in speeds] == [
        "packed",
        "transformers, padded",
        "transformers, padded, sorted by length",
    ]
