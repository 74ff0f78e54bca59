"""Exports of models with heads: loaded by transformers in another process, labels and pipelines included."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from probes import forked_probes
from transformers import AutoModelForSequenceClassification

import neobert
from neobert.config.schema import Config
from neobert.export.verify import Verdict, verify
from neobert.export.write import Exported, ExportRequest, export
from neobert.finetune.job import finetune

Labelled = Callable[..., Config]

KINDS = {
    "classes": ["model.tie_word_embeddings=false"],
    "pairs": ["finetune.pooling=cls", "model.qk_norm=true", "model.decoder_bias=true"],
    "numbers": ["finetune.kind=regression", "finetune.pooling=cls"],
    "several": ["finetune.kind=multilabel", "model.embedding_norm=true"],
    "words": ["finetune.kind=tokens"],
}
"""A model of each kind, with an architecture that transformers has or has not; one has a projection of its own."""

FORMS = {"classes": "native", "pairs": "remote_code", "numbers": "native", "several": "remote_code", "words": "native"}
TEXTS = {"pairs": "the cat saw the house\tagain", "numbers": "the cat saw the house\tagain", "words": "the cat saw"}


@pytest.fixture(scope="module")
def runs(labelled: Labelled, labelled_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, more in KINDS.items():
        settings = [
            f"dataset.path={labelled_files}/{name}.jsonl",
            "trainer.max_steps=4",
            "model.embedding_init_range=0.3",
        ]
        finetune(labelled(folder / name, *settings, *more))
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def exports(
    runs: dict[str, Path], own_module_cache: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(ExportRequest(source=str(run), output=folder / name)) for name, run in runs.items()}


@pytest.fixture(scope="module")
def verdicts(
    runs: dict[str, Path], exports: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Verdict]:
    renamed = tmp_path_factory.mktemp("broken") / "renamed"
    shutil.copytree(exports["classes"].folder, renamed)
    config = json.loads((renamed / "config.json").read_text())
    first, second, *_ = config["id2label"].values()
    config["id2label"] |= {"0": second, "1": first}
    (renamed / "config.json").write_text(json.dumps(config))
    pairs = [(exports[name].folder, str(runs[name])) for name in KINDS] + [(renamed, str(runs["classes"]))]
    with forked_probes():
        return dict(zip([*KINDS, "renamed"], verify(pairs), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_transformers_says_what_we_say(verdicts: dict[str, Verdict], exports: dict[str, Exported], name: str) -> None:
    assert exports[name].form == FORMS[name]
    assert verdicts[name].passed, verdicts[name].describe()
    checked = {check.name for check in verdicts[name].checks}
    pipeline = "token-classification pipeline" if name == "words" else "text-classification pipeline"
    assert {"labels", pipeline, "from text"} <= checked


def test_labels_in_another_order_are_found(verdicts: dict[str, Verdict]) -> None:
    wrong = {check.name for check in verdicts["renamed"].checks if not check.passed}
    assert wrong == {"labels", "text-classification pipeline"}


@pytest.mark.parametrize("name", KINDS)
def test_an_export_answers_as_the_run_does(runs: dict[str, Path], exports: dict[str, Exported], name: str) -> None:
    text = TEXTS.get(name, "the cat saw the house")
    ours, theirs = (neobert.load(x).predict([text])[0] for x in (runs[name], exports[name].folder))
    assert ours.describe() == theirs.describe()


def test_an_export_is_exported_again(exports: dict[str, Exported], tmp_path: Path) -> None:
    again = export(ExportRequest(source=str(exports["classes"].folder), output=tmp_path / "again", dtype="bf16"))
    model = AutoModelForSequenceClassification.from_pretrained(again.folder)
    assert (
        model.config.id2label
        == AutoModelForSequenceClassification.from_pretrained(exports["classes"].folder).config.id2label
    )
    assert "pipeline(" in (again.folder / "README.md").read_text()
    assert (again.folder / "head.json").read_text() == (exports["classes"].folder / "head.json").read_text()
