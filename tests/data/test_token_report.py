"""The report: numbers equal to those counted plainly, for whole documents and for pieces over many batches."""

import io
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from neobert.data.source.documents import EncodedDocument
from neobert.data.store import prepare as meter
from neobert.data.store import token_folder
from neobert.data.store.prepare import Meter, prepare_tokens
from neobert.data.store.report import write_report
from neobert.data.store.token_folder import PrepareSettings
from neobert.errors import DataError

SETTINGS = PrepareSettings(max_document_chars=100, max_bad_records=0, file_tokens=3000)


class Plain:
    fingerprint = "given"

    def __init__(self, documents):
        self._documents = documents

    def open(self, span, encode, counts, max_document_chars, num_ahead=0):
        for number, tokens in enumerate(self._documents):
            yield EncodedDocument(number, np.array(tokens, dtype=np.int32), {})

    def count(self, span):
        return None


@pytest.fixture
def documents(tokenizer):
    rng = np.random.default_rng(1)
    found = [rng.integers(10, 15, size=size).tolist() for size in rng.integers(1, 60, size=300)]
    found += [[tokenizer.unk_id] * 7, found[5], found[5], found[9], found[9][::-1]]
    return found


@pytest.mark.parametrize("values", [{}, {"special_tokens": True}, {"max_length": 9, "special_tokens": True}])
def test_the_numbers_are_those_counted_plainly(tmp_path, tokenizer, documents, values, monkeypatch):
    monkeypatch.setattr(token_folder, "BATCH_TOKENS", 256)
    prepare_tokens(Plain(documents), tokenizer, tmp_path / "d", replace(SETTINGS, **values))
    found, text = write_report(tmp_path / "d", max_length=30)
    lengths = sorted(map(len, documents))
    assert (found["num_documents"], found["num_tokens"]) == (305, sum(lengths))
    assert found["mean"] == pytest.approx(np.mean(lengths))
    assert (found["shortest"], found["longest"]) == (lengths[0], lengths[-1])
    wanted = {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in (1, 5, 25, 50, 75, 95, 99)}
    assert found["percentiles"] == wanted
    assert found["unknown_share"] == pytest.approx(7 / sum(lengths))
    assert found["duplicates"] == 305 - len({tuple(tokens) for tokens in documents})
    assert found["longer_than_row"]["30"] == sum(size + 2 > 30 for size in lengths) / 305
    assert found["histogram"][-1] == {"from": 32, "to": 63, "documents": sum(size >= 32 for size in lengths)}
    assert sum(entry["documents"] for entry in found["histogram"]) == 305
    assert json.loads((tmp_path / "d" / "report.json").read_text()) == found
    assert "305 documents" in text
    picture = ElementTree.fromstring((tmp_path / "d" / "report.svg").read_text())
    assert len(picture.findall("{http://www.w3.org/2000/svg}rect")) == 1 + len(found["histogram"])


def test_a_folder_of_somebody_else(tmp_path):
    """No manifest: which token is the unknown one is not known, everything else is."""
    Dataset.from_dict({"input_ids": [[5, 6], [], [5, 6]]}).save_to_disk(tmp_path / "d")
    found, text = write_report(tmp_path / "d")
    assert (found["num_documents"], found["num_tokens"], found["duplicates"]) == (3, 4, 1)
    assert found["unknown_share"] is None
    assert "not known, there is no manifest" in text
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match=r"has no column input_ids \(columns: text\)"):
        write_report(tmp_path / "text")


def test_without_a_terminal_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 11.5, 12.0, 23.0])
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with Meter("corpus", console=Console(file=out)) as shown:
        for number in range(1, 6):
            shown.show(number, 1000 * number, number / 10)
    assert out.getvalue().splitlines() == [
        "corpus: 3 documents, 3,000 tokens, 190 tokens/s (30%)",
        "corpus: 5 documents, 5,000 tokens, 182 tokens/s (50%)",
    ]


def test_on_a_terminal_a_bar(monkeypatch):
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    out = io.StringIO()
    with Meter("corpus", console=Console(file=out, force_terminal=True, width=120)) as shown:
        monkeypatch.setattr(meter.time, "monotonic", lambda: 1e9)
        shown.show(3, 3000, 0.3)
        shown._progress.refresh()
    assert "3 documents, 3,000 tokens" in out.getvalue()
