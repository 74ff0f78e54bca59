"""A start reads the end of `log.jsonl` alone, however long the file is."""

import json
from pathlib import Path

import pytest

from neobert.train.record import sinks
from neobert.train.record.sinks import LineFile


def write_log(path: Path, num_steps: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for step in range(1, num_steps + 1):
        lines.append({"kind": "step", "step": step, "loss": 1 / step})
        lines += [{"kind": "log", "step": step, "text": "é" * step}] if step % 3 == 0 else []
    path.write_text("".join(json.dumps(line, ensure_ascii=step % 2 == 0) + "\n" for step, line in enumerate(lines)))
    return lines


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_lines_from_the_end_are_those_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(sinks, "BLOCK_BYTES", block)
    path = tmp_path / "log.jsonl"
    lines = write_log(path, 9)
    with path.open("a") as file:
        file.write('not json\n[1]\n{"kind": "step", "step": 10}\n{"kind": "step", "st')
    log = LineFile(path)
    found = list(log.read_back())
    assert [line for _, line in found] == [{"kind": "step", "step": 10}, *lines[::-1]]
    content = path.read_bytes()
    for end, line in found:
        assert json.loads(content[:end].splitlines()[-1]) == line
        assert content[end - 1 : end] == b"\n"
    log.cut_torn()
    assert path.read_bytes() == content[: found[0][0]]


@pytest.mark.parametrize("text", ["", "\n", "torn", "torn\n\n"])
def test_a_file_without_a_line_has_none(tmp_path: Path, text: str) -> None:
    log = LineFile(tmp_path / "log.jsonl")
    assert list(log.read_back()) == []
    log.cut_torn()
    assert not (tmp_path / "log.jsonl").exists()
    (tmp_path / "log.jsonl").write_text(text)
    assert list(log.read_back()) == []
    log.cut_torn()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_reader_that_stops_reads_no_more_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "BLOCK_BYTES", 4096)
    parsed: list[str] = []
    parse = sinks._parse
    monkeypatch.setattr(sinks, "_parse", lambda text: parsed.append(text) or parse(text))
    lines = write_log(tmp_path / "log.jsonl", 2000)
    for _, line in LineFile(tmp_path / "log.jsonl").read_back():
        if line["step"] == 1998:
            break
    assert line in lines
    assert len(parsed) <= 5
