"""A small model of random weights, and a run folder that holds it."""

import json
from pathlib import Path

import pytest
from small_model import write_run

import neobert
from neobert.inference.model import Model


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A run whose newest checkpoint, of step 12, holds the model; the one of step 7 is empty of weights."""
    return write_run(tmp_path_factory.mktemp("run"), tokenizer_folder)


@pytest.fixture(scope="session")
def loaded(run_folder: Path) -> Model:
    return neobert.load(run_folder, device="cpu")


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Thirty texts, two bad records (lines 4 and 9) and a blank line."""
    lines = [json.dumps({"text": text}) for text in texts[:30]]
    lines[3:3], lines[8:8], lines[12:12] = ["{bad"], ['["array"]'], [""]
    file = tmp_path_factory.mktemp("jsonl") / "mine.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file
