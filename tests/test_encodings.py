"""Files that hold words of people are UTF-8, whatever the locale's encoding is."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from neobert.config.load import load_config, parse_config
from neobert.data.tokenizer import train_tokenizer
from neobert.export.sentence_files import _write
from neobert.export.tokenizer_files import save_tokenizer
from neobert.train.checkpoint.save import _text_writer
from neobert.train.start import write_config
from neobert.weights.vector_settings import _read


@pytest.fixture(autouse=True)
def ascii_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a locale of ASCII does to files that are opened without an encoding."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "ascii")


def test_the_configs_of_a_run(tmp_path: Path) -> None:
    config = parse_config("", ["dataset.path=texte/\u00fcber.jsonl", "tokenizer.train=true", "trainer.max_steps=1"])
    write_config(config, SimpleNamespace(is_main=True), tmp_path, None)  # type: ignore[arg-type]
    assert load_config(tmp_path / "config.yaml") == config
    _text_writer("\u00fcber")(tmp_path / "saved.yaml")
    assert (tmp_path / "saved.yaml").read_bytes() == "\u00fcber".encode()


def test_files_of_an_export(tmp_path: Path) -> None:
    _write(tmp_path / "prompts.json", {"query": "\u00fcber: "})
    assert _read(tmp_path / "prompts.json") == {"query": "\u00fcber: "}
    (tmp_path / "source").mkdir()
    train_tokenizer(iter(["a text"]), algorithm="byte_bpe", vocab_size=270).save(tmp_path / "source")
    file = tmp_path / "source" / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {"comment": "\u00fcber"}
    file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "out").mkdir()
    save_tokenizer(tmp_path / "source", tmp_path / "out", max_length=8)
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["comment"] == "\u00fcber"
