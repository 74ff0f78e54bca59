"""Pretraining on documents of Python: written once, resumed exactly, refused when they are others."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from records import exact_steps

import neobert
from neobert.config.schema import Config
from neobert.data.source.hub import write_documents
from neobert.errors import DataError, UserError


def test_texts_train_and_resume_bit_for_bit(tiny: Callable[..., Config], texts: list[str], tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = ("trainer.save_steps=4", "scheduler.total_steps=8")
    assert neobert.pretrain(tiny(whole, *settings, "trainer.max_steps=8"), texts).state.step == 8
    neobert.pretrain(tiny(run, *settings, "trainer.max_steps=4"), texts)
    resumed = tiny(run, *settings, "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest")
    (folder,) = (tmp_path / "run-data").iterdir()
    with pytest.raises(UserError, match=r"data: .* other documents, .* pass them to resume"):
        neobert.pretrain(resumed, [*texts, "one more"])
    as_dataset = Dataset.from_dict({"text": texts + texts}).select(range(len(texts)))
    assert neobert.pretrain(resumed, as_dataset).state.step == 8
    assert folder.is_dir()
    assert exact_steps(run) == exact_steps(whole)


@pytest.mark.parametrize(("data", "said"), [("one text", "a list of"), ([1], "a list of"), ([], "at least")])
def test_other_data_is_refused(data: object, said: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        neobert.pretrain(tiny(tmp_path / "run"), data)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_names_of_the_package_are_the_functions_themselves() -> None:
    for name in neobert.__all__:
        assert callable(getattr(neobert, name))
    with pytest.raises(AttributeError, match="no attribute 'train_it'"):
        _ = neobert.train_it


def test_two_processes_that_write_the_same_documents_at_once_use_one_copy(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = Dataset.save_to_disk, []

    def save_second(data: Dataset, path: str) -> None:
        monkeypatch.setattr(Dataset, "save_to_disk", save)
        save(data, path)
        written.append(write_documents(texts, tmp_path))  # The other process starts later and ends first.

    monkeypatch.setattr(Dataset, "save_to_disk", save_second)
    folder = write_documents(texts, tmp_path)
    assert written == [folder]
    assert list(tmp_path.iterdir()) == [folder]
    assert load_from_disk(str(folder))["text"][:] == texts
