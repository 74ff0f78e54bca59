"""Which tokenizer a run has: what tokenizer.json says, or its checkpoint; never one whose mask occurs in text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import normalizers
from transformers import AutoTokenizer

from neobert.config.schema import Config, TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import DataError
from neobert.export.forms import ExportError
from neobert.export.write import ExportRequest, export
from neobert.inference.fill_mask import fill_mask
from neobert.inference.model import load
from neobert.inference.scorer import OwnScorer, TransformersScorer
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]


def edit(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def misnamed(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json with a normaliser that the class in tokenizer_config.json does not have."""
    folder = tmp_path_factory.mktemp("misnamed") / "tokenizer"
    tokenizer = load_tokenizer(TokenizerSection(path=str(tokenizer_folder)))
    tokenizer.save(folder)
    edit(folder, "tokenizer.json", normalizer=json.loads(normalizers.NFKC().__getstate__()))
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    return folder


def test_a_run_trains_and_exports_what_the_file_says(tiny: Tiny, tmp_path: Path, misnamed: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, f"tokenizer.path={misnamed}", "trainer.max_steps=1", "trainer.eval_steps=0"))
    said = (out / "training.log").read_text()
    assert f"warning: tokenizer.path: {misnamed}: tokenizer_config.json names GPT2Tokenizer, of which" in said
    written = json.loads((misnamed / "tokenizer.json").read_text())
    saved = json.loads((out / "checkpoints/1/tokenizer/tokenizer.json").read_text())
    assert saved["normalizer"] == written["normalizer"] == {"type": "NFKC"}
    assert len(saved["added_tokens"]) == 5
    done = export(ExportRequest(source=str(out), output=tmp_path / "exported"))
    text = "ﬁne times ½"
    (ids,) = load(out, device="cpu").tokenizer.encode_batch([text])
    plain = AutoTokenizer.from_pretrained(done.folder)
    assert plain(text).input_ids == [2, *ids.tolist(), 3]
    edit(done.folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.warns(UserWarning, match="names GPT2Tokenizer, of which transformers"):
        scorer = TransformersScorer(str(done.folder), device="cpu", dtype=None, trust_remote_code=False)  # type: ignore[arg-type]
    assert scorer.tokenizer.encode_batch([text])[0].tolist() == ids.tolist()
    with pytest.warns(UserWarning, match="names GPT2Tokenizer, of which transformers"):
        assert load(done.folder, device="cpu").tokenizer.encode_batch([text])[0].tolist() == ids.tolist()


def test_a_run_that_has_what_transformers_makes_of_the_file_keeps_it(
    tiny: Tiny, tmp_path: Path, misnamed: Path
) -> None:
    """As versions before did: the checkpoint has the tokenizer that its weights know."""
    rebuilt, out = tmp_path / "rebuilt", tmp_path / "run"
    AutoTokenizer.from_pretrained(misnamed).save_pretrained(rebuilt)
    pretrain(tiny(out, f"tokenizer.path={rebuilt}", "trainer.max_steps=1", "trainer.eval_steps=0"))
    resume = [f"tokenizer.path={misnamed}", "trainer.max_steps=2", "trainer.resume_from_checkpoint=latest"]
    assert pretrain(tiny(out, *resume)).state.step == 2
    tokenizers = [json.loads((out / f"checkpoints/{n}/tokenizer/tokenizer.json").read_text()) for n in (1, 2)]
    assert tokenizers[0] == tokenizers[1]


def test_a_mask_that_is_the_unknown_token_is_refused_wherever_masks_are(
    tiny: Tiny, tmp_path: Path, tokenizer_folder: Path
) -> None:
    bad, out = tmp_path / "bad", tmp_path / "run"
    load_tokenizer(TokenizerSection(path=str(tokenizer_folder))).save(bad)
    edit(bad, "tokenizer_config.json", mask_token="[UNK]")
    refusal = r"mask_token of the tokenizer .* is '\[UNK\]', which is its unk_token too"
    with pytest.raises(DataError, match=refusal):
        pretrain(tiny(out, f"tokenizer.path={bad}", "dataset.path=/nowhere"))
    rewritten = [f"tokenizer.path={bad}", "tokenizer.allow_special_token_rewrite=true", "trainer.max_steps=1"]
    pretrain(tiny(out, *rewritten, "trainer.eval_steps=0"))
    done = export(ExportRequest(source=str(out), output=tmp_path / "exported"))
    edit(done.folder, "tokenizer_config.json", mask_token="[UNK]")
    model = load(done.folder, device="cpu")
    assert model.embed(["vectors have no masks"]).shape == (1, 32)
    with pytest.raises(DataError, match=refusal):
        fill_mask(model.module, model.tokenizer, ["a [MASK]"])
    with pytest.raises(DataError, match=refusal):
        OwnScorer(model)
    with pytest.raises(ExportError, match=refusal):
        export(ExportRequest(source=str(done.folder), output=tmp_path / "again"))


def test_a_negative_token_far_inside_stops_a_run_with_one_sentence(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neobert.data.store.tokens._SAMPLE", 2)
    documents = [[5 + n % 300] * 20 for n in range(400)]
    documents[77] = [*documents[77], -100]
    Dataset.from_dict({"input_ids": documents}).save_to_disk(tmp_path / "tokens")
    with pytest.raises(DataError, match=r"tokens holds token -100 at document 77, but tokens start at 0"):
        pretrain(tiny(tmp_path / "run", f"dataset.path={tmp_path / 'tokens'}", "trainer.eval_steps=0"))
