"""Runs of every variant, exported once and verified in one process: starting transformers takes longer than a test.

Once also where several processes split the tests: the first that needs a result makes it, and the others read it.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from damage import DAMAGES
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizer, XLMRobertaTokenizer
from variants import EXPORTS, RUNS

from neobert.config.schema import Config
from neobert.data.tokenizer import train_tokenizer
from neobert.export.verify import Verdict, verify
from neobert.export.write import Exported, ExportRequest, export
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
Result = TypeVar("Result")


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Result]) -> Result:
    """What `make` returns, called with a folder of this session by one of its processes. Nobody changes the folder."""
    session = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    folder, made = session / name, session / f"{name}.pickle"
    with FileLock(session / f"{name}.lock"):
        if not made.exists():
            folder.mkdir()
            made.write_bytes(pickle.dumps(make(folder)))
        result: Result = pickle.loads(made.read_bytes())
    return result


@pytest.fixture(scope="session", autouse=True)
def _own_module_cache(own_module_cache: None) -> None:
    """All of these tests load folders with code."""


@pytest.fixture(scope="session")
def tokenizers_of_classes(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers as published models have them: their classes say on their own what they return."""
    folder = tmp_path_factory.mktemp("tokenizers")
    wordpiece = train_tokenizer(iter(texts), "wordpiece", 200)
    BertTokenizer(vocab=wordpiece.vocabulary).save_pretrained(folder / "wordpiece")
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    unigram.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    vocab = [(word, score) for word, score in json.loads(unigram.to_str())["model"]["vocab"]]
    XLMRobertaTokenizer(vocab=vocab).save_pretrained(folder / "unigram")
    return folder


@pytest.fixture(scope="session")
def runs(tiny: Tiny, tokenizers_of_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small trained models with weights large enough to make outputs differ."""

    def make(folder: Path) -> dict[str, Path]:
        settings = ["trainer.max_steps=8", "trainer.save_steps=0", "trainer.eval_steps=0"]
        settings += ["model.embedding_init_range=0.3", "model.decoder_init_range=0.3"]
        for name, more in RUNS.items():
            more = [word.replace("TOKENIZERS", str(tokenizers_of_classes)) for word in more]
            pretrain(tiny(folder / name, *settings, *more))
        return {name: folder / name for name in RUNS}

    return make_once(tmp_path_factory, "runs", make)


@pytest.fixture(scope="session")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    def make(folder: Path) -> dict[str, Exported]:
        return {
            name: export(ExportRequest(source=str(runs[run]), output=folder / name, form=form, dtype=dtype))
            for name, (run, form, dtype) in EXPORTS.items()
        }

    return make_once(tmp_path_factory, "exports", make)


@pytest.fixture(scope="session")
def verdicts(
    runs: dict[str, Path], exports: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Verdict]:
    """Of every export, and of copies of the native folder with one thing wrong, against the run it was made from."""

    def make(folder: Path) -> dict[str, Verdict]:
        pairs = [(done.folder, str(runs[EXPORTS[name][0]])) for name, done in exports.items()]
        pairs += [
            (damage(exports["native"].folder, folder / name), str(runs["tied"])) for name, damage in DAMAGES.items()
        ]
        return {Path(verdict.folder).name: verdict for verdict in verify(pairs)}

    return make_once(tmp_path_factory, "verdicts", make)
