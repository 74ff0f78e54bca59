"""Embeddings of files: order, gaps, and files that do not depend on interruptions."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from neobert.errors import DataError
from neobert.inference import embed, jobs
from neobert.inference.embed import EmbedReport, EmbedSettings, check_output, embed_to_file
from neobert.inference.jobs import JobError, load_done, save_done
from neobert.inference.model import Model
from neobert.inference.texts import open_texts

SETTINGS = EmbedSettings(batch_tokens=100, chunk_texts=4)

GAPS = [3, 8, 12]
"""Records of `jsonl` without text."""


def run(model: Model, source: Path | str, output: Path, settings: EmbedSettings = SETTINGS) -> EmbedReport:
    with open_texts(str(source)) as texts:
        return embed_to_file(model, texts, output, settings)


def _failing(real: Callable[..., Any], when: int) -> Callable[..., Any]:
    """A function that is interrupted at its call number `when`."""
    calls = iter(range(100))

    def call(*args: Any) -> Any:
        if next(calls) == when:
            raise KeyboardInterrupt
        return real(*args)

    return call


def test_rows_have_the_order_of_the_input(loaded: Model, jsonl: Path, texts: list[str], tmp_path: Path) -> None:
    report = run(loaded, jsonl, tmp_path / "new" / "v.npy")
    expected = loaded.embed(texts[:30]).numpy()
    vectors = np.load(tmp_path / "new" / "v.npy")
    assert not vectors[GAPS].any(), "rows of zeros for records without text"
    np.testing.assert_allclose(np.delete(vectors, GAPS, axis=0), expected, rtol=1e-4, atol=1e-5)
    assert (report.num_records, report.num_texts) == (33, 30)
    assert report.num_resumed == 0
    assert report.num_truncated == sum(len(ids) > 38 for ids in loaded.tokenizer.encode_batch(texts[:30])) > 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["v.npy"]


def test_parquet_names_the_record(loaded: Model, jsonl: Path, texts: list[str], tmp_path: Path) -> None:
    settings = EmbedSettings(pooling="cls", normalize=True, chunk_texts=7)
    run(loaded, jsonl, tmp_path / "v.parquet", settings)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["id"].to_pylist() == list(range(33))
    hashes = [hashlib.sha256(t.encode()).hexdigest() for t in texts[:30]]
    for gap in GAPS:
        hashes.insert(gap, None)
    assert table["text_sha256"].to_pylist() == hashes
    vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    assert not vectors[GAPS].any()
    vectors = np.delete(vectors, GAPS, axis=0)
    expected = loaded.embed(texts[:30], pooling="cls", normalize=True).numpy()
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)


def test_bad_records_are_named_and_counted(jsonl: Path) -> None:
    with open_texts(str(jsonl)) as texts:
        assert len(list(texts.read())) == 30
        skipped, bad, first, second = texts.describe_gaps()
    assert skipped == "skipped: 1 records without text"
    assert bad == "skipped: 2 records that cannot be read, the first ones:"
    assert f"{jsonl}:4: " in first
    assert f"{jsonl}:9: a JSON object was expected, not list" in second


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_killed_job_continues_with_the_same_bytes(
    loaded: Model, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    run(loaded, jsonl, tmp_path / f"whole{suffix}")
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    output = tmp_path / f"v{suffix}"
    real_save, real_write = jobs.save_done, embed.WRITERS[suffix]
    for number in range(3):  # killed before and after a chunk is recorded, and while the output is put together
        monkeypatch.setattr(jobs, "save_done", _failing(real_save, number))
        with pytest.raises(KeyboardInterrupt):
            run(loaded, jsonl, output)
        assert not output.exists()
    monkeypatch.setattr(jobs, "save_done", real_save)
    monkeypatch.setitem(embed.WRITERS, suffix, _failing(real_write, 0))
    with pytest.raises(KeyboardInterrupt):
        run(loaded, jsonl, output)
    assert not output.exists()
    monkeypatch.setitem(embed.WRITERS, suffix, real_write)
    report = run(loaded, jsonl, output)
    assert output.read_bytes() == whole
    assert report.num_resumed == report.num_records == 33


def test_other_settings_do_not_continue(
    loaded: Model, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embed.WRITERS, ".npy", _failing(embed.WRITERS[".npy"], 0))
    with pytest.raises(KeyboardInterrupt):
        run(loaded, jsonl, tmp_path / "v.npy")
    with pytest.raises(JobError, match=r"other settings \(pooling was 'mean' and is 'max'\); give those, or delete it"):
        run(loaded, jsonl, tmp_path / "v.npy", EmbedSettings(pooling="max", batch_tokens=100, chunk_texts=4))


def test_errors(loaded: Model, jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "there.npy").write_text("")
    with pytest.raises(JobError, match=r"there\.npy exists already; delete it, or name another file"):
        run(loaded, jsonl, tmp_path / "there.npy")
    with pytest.raises(JobError, match=r"ends in none of \.npy, \.parquet"):
        run(loaded, jsonl, tmp_path / "v.csv")
    with pytest.raises(ValueError, match="pooling: 'avg' is unknown; write one of mean, cls, max"):
        EmbedSettings(pooling="avg")
    with pytest.raises(ValueError, match="--batch-tokens: 0; write a positive number"):
        EmbedSettings(batch_tokens=0)
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="has no text to embed; check the file and --text-column"):
        run(loaded, blank, tmp_path / "v.npy")
    assert not (tmp_path / "v.npy.parts").exists()
    with pytest.raises(DataError, match=r"input: .*nothing\.jsonl does not exist"):
        run(loaded, tmp_path / "nothing.jsonl", tmp_path / "v.npy")
    several = tmp_path / "several.jsonl"
    several.write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(DataError, match=r"--text-column .* name one of a, b"):
        run(loaded, several, tmp_path / "v.npy")


def test_standard_input(loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = loaded.embed(["the cat", "a dog"]).numpy()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("the cat", "a dog"))
    for number, content in enumerate((lines, "\nthe cat\na dog\n")):  # An empty line is a line: number 0 has zeros.
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
        run(loaded, "-", tmp_path / f"{number}.npy")
        vectors = np.load(tmp_path / f"{number}.npy")
        assert vectors.shape == (2 + number, 32)
        assert not vectors[:number].any()
        np.testing.assert_allclose(vectors[number:], wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\n")))
    with pytest.raises(DataError, match="the standard input is empty"):
        run(loaded, "-", tmp_path / "v.npy")


def test_a_split_must_be_chosen_where_there_are_several(loaded: Model, tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    with pytest.raises(DataError, match="has the splits test, train; choose one with --split"):
        run(loaded, tmp_path, tmp_path / "v.npy")
    with open_texts(str(tmp_path), split="test") as texts:
        assert [text.text for text in texts.read()] == ["test.jsonl"]


def test_a_second_process_at_one_output_is_stopped_before_it_loads_the_model(
    loaded: Model, jsonl: Path, tmp_path: Path
) -> None:
    """The first of the two ends as if it were alone."""
    output = tmp_path / "v.npy"
    code = (
        "import sys, time; from pathlib import Path; from neobert.disk import only_writer\n"
        "with only_writer(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        for attempt in (lambda: check_output(output), lambda: run(loaded, jsonl, output)):
            with pytest.raises(DataError, match=r"another process is writing .*v.npy; wait until it ends, or stop it"):
                attempt()
        assert [p.name for p in tmp_path.iterdir() if p != jsonl] == [".v.npy.lock"], "nothing was started"
        first.kill()
    assert run(loaded, jsonl, output).num_texts == 30, "a lock ends with its process"
    assert not (tmp_path / ".v.npy.lock").exists()


def test_parts_of_an_earlier_version_are_named_as_such(tmp_path: Path) -> None:
    """Nobody can give a setting that was not recorded."""
    file = tmp_path / "v.npy.parts" / "progress.json"
    file.parent.mkdir()
    save_done(file, {"pooling": "mean"}, {"num": 1})
    now = {"pooling": "mean", "rows": "records", "split": None}
    with pytest.raises(JobError, match=r"earlier version, .* \(rows not recorded\); delete .*v\.npy\.parts$"):
        load_done(file, now)
    assert load_done(file, {"pooling": "mean", "split": None}) == {"num": 1}
