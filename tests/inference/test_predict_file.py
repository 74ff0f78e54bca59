"""Answers for files, whatever the model answers, and jobs in bounded memory."""

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neobert.inference import jobs, mlm_loss
from neobert.inference.embed import EmbedSettings, embed_to_file
from neobert.inference.jobs import JobError, progress_file
from neobert.inference.mlm_loss import LossSettings, measure_mlm_loss
from neobert.inference.model import Model
from neobert.inference.predict import PredictReport, PredictSettings, predict_to_file
from neobert.inference.pseudo_perplexity import ScoreSettings, pseudo_perplexity_to_file, summarize
from neobert.inference.scorer import BatchLoss, OwnScorer
from neobert.inference.texts import InputRecord, Texts, open_texts
from neobert.objectives.base import Answers
from neobert.objectives.replaced_token import REPLACED_TOKEN, ReplacedTokenDetector

SETTINGS = PredictSettings(top_k=2, chunk_texts=4)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with a mask, and records of every kind that has no answer."""
    lines = [json.dumps({"text": f"the [MASK] sees {n} stones"}) for n in range(9)]
    lines[2:2] = ["{bad", json.dumps({"text": "no mask here"}), json.dumps({"text": "the [MASK] " + "long " * 60})]
    lines.insert(7, json.dumps({"text": None}))
    file = tmp_path_factory.mktemp("masked") / "in.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def run(model: Model, source: Path, output: Path, settings: PredictSettings = SETTINGS) -> PredictReport:
    with open_texts(str(source)) as texts:
        return predict_to_file(model, texts, output, settings)


def failing(real: Callable[..., None], when: int, *, noted: bool = False) -> Callable[..., None]:
    """A function that is interrupted at its call number `when`, before or after its work."""
    calls = iter(range(100))

    def call(*args: object) -> None:
        now = next(calls) == when
        if now and not noted:
            raise KeyboardInterrupt
        real(*args)
        if now:
            raise KeyboardInterrupt

    return call


def test_every_record_has_its_line_in_order(loaded: Model, masked: Path, tmp_path: Path) -> None:
    report = run(loaded, masked, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == list(range(13))
    problems = {line["record"]: line["problem"] for line in lines if "problem" in line}
    assert set(problems) == {2, 3, 4, 7}
    assert f"{masked}:3" in problems[2]
    assert "has no mask" in problems[3]
    assert "the model takes 40" in problems[4]
    assert problems[7] == "no text"
    answered = [line for line in lines if "problem" not in line]
    expected = loaded.fill_mask([line["text"] for line in answered], top_k=2)
    assert [line["text"] for line in answered] == [f"the [MASK] sees {n} stones" for n in range(9)]
    for line, filled in zip(answered, expected):
        assert [guess["token"] for guess in line["masks"][0]] == [guess.token for guess in filled.masks[0]]
        found = [guess["probability"] for guess in line["masks"][0]]
        assert found == pytest.approx([guess.probability for guess in filled.masks[0]], rel=1e-4)
    assert (report.num_records, report.num_texts, report.num_refused) == (13, 11, 2)
    assert report.throughput.num_texts == 11
    assert report.throughput.num_tokens > 50
    assert "texts/s" in report.throughput.describe()
    assert "tokens/s" in report.throughput.describe()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_killed_job_has_the_same_bytes(
    loaded: Model, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PredictSettings(top_k=2, chunk_texts=1)
    run(loaded, masked, tmp_path / "whole.jsonl", settings)
    output, real, rng = tmp_path / "out.jsonl", jobs.save_done, random.Random(0)
    for _ in range(4):  # after lines were written, before that was noted or after it
        monkeypatch.setattr(jobs, "save_done", failing(real, rng.randrange(3), noted=rng.random() < 0.5))
        with pytest.raises(KeyboardInterrupt):
            run(loaded, masked, output, settings)
        if output.exists():
            with output.open("a") as out:
                out.write('{"record": 99, "te')
    monkeypatch.setattr(jobs, "save_done", real)
    with pytest.raises(JobError, match="top_k was 2 and is 3"):
        run(loaded, masked, output, PredictSettings(top_k=3, chunk_texts=1))
    report = run(loaded, masked, output, settings)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert report.num_records == 13
    assert 0 < report.throughput.num_texts < 11, "of this start alone"
    with pytest.raises(JobError, match=r"out\.jsonl exists already"):
        run(loaded, masked, output, settings)


def test_an_output_that_was_changed_is_refused(
    loaded: Model, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(jobs, "save_done", failing(jobs.save_done, 2))
    with pytest.raises(KeyboardInterrupt):
        run(loaded, masked, output)
    output.unlink()
    with pytest.raises(JobError, match=r"out\.jsonl has 0 bytes.*delete it and .*out\.jsonl\.progress\.json"):
        run(loaded, masked, output)


def test_a_wrong_question_is_refused_before_any_record(loaded: Model, masked: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k: 0 is outside the vocabulary"):
        run(loaded, masked, tmp_path / "out.jsonl", PredictSettings(top_k=0))
    with pytest.raises(JobError, match=r"does not end in \.jsonl"):
        run(loaded, masked, tmp_path / "out.csv")
    with pytest.raises(ValueError, match="--chunk-texts: 0"):
        PredictSettings(chunk_texts=0)
    assert not list(tmp_path.iterdir())


def test_a_model_of_replaced_tokens_judges_a_file(loaded: Model, jsonl: Path, tmp_path: Path) -> None:
    detector = ReplacedTokenDetector(loaded.module.encoder).eval()
    model = replace(loaded, module=detector, objective=REPLACED_TOKEN)
    with pytest.raises(ValueError, match="--joint: is for models of masked language modelling"):
        run(model, jsonl, tmp_path / "out.jsonl", PredictSettings(joint=True))
    assert run(model, jsonl, tmp_path / "out.jsonl").num_refused == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 33
    judged = [line for line in lines if "problem" not in line]
    assert all(0 < token["probability"] < 1 for line in judged for token in line["tokens"])


@dataclass(frozen=True)
class Length:
    """What a model of another objective says."""

    text: str
    num_words: int


LENGTHS = Answers(
    answer=lambda model, texts, *, top_k, joint: [Length(text, len(text.split())) for text in texts],
    show=lambda model, documents, *, num_texts, top_k: [],
    example="any text",
)


def test_the_answers_of_any_objective_are_written(loaded: Model, jsonl: Path, tmp_path: Path) -> None:
    model = replace(loaded, objective=replace(loaded.objective, answers=f"{__name__}:LENGTHS"))
    run(model, jsonl, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 33
    assert all(line["num_words"] == len(line["text"].split()) for line in lines if "problem" not in line)


def test_the_loss_of_a_killed_job_is_that_of_one_left_alone(
    loaded: Model, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlm_loss, "_BLOCK_DOCUMENTS", 7)
    for settings in (LossSettings(max_documents=25), LossSettings(whole_words=True, piece_chars=60)):
        output, real = tmp_path / "loss.json", jobs.save_done

        def measure(output: Path | None, settings: LossSettings = settings) -> mlm_loss.MlmLoss:
            with open_texts(str(jsonl)) as texts:
                return measure_mlm_loss(OwnScorer(loaded), texts, settings, output)[0]

        whole = measure(None)
        monkeypatch.setattr(jobs, "save_done", failing(real, 2))
        with pytest.raises(KeyboardInterrupt):
            measure(output)
        assert json.loads(progress_file(output).read_text())["num_records"] == 14
        monkeypatch.setattr(jobs, "save_done", real)
        assert measure(output) == whole
        assert json.loads(output.read_text())["loss"] == whole.loss
        with pytest.raises(JobError, match="exists already"):
            measure(output)
        assert [path.name for path in tmp_path.iterdir()] == ["loss.json"]
        output.unlink()


class Counted(str):
    """A text that is counted while it lives."""

    alive = most = 0

    def __new__(cls, text: str) -> "Counted":  # Copies are made through it too.
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        return super().__new__(cls, text)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_the_texts_in_memory_do_not_grow_with_the_file(
    loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many for a hundred times the records; stand-ins compute."""

    def vectors(model: Model, documents: Sequence[object], **options: object) -> torch.Tensor:
        return torch.zeros(len(documents), model.hidden_size)

    def score(model: Model, documents: Sequence[object], *settings: object) -> list[tuple[int, float]]:
        return [(1, 1.0) for _ in documents]

    def records(texts: Texts, *position: Any) -> Iterator[InputRecord]:
        return (record._replace(text=Counted(record.text)) for record in read(texts, *position))

    read = Texts.records
    monkeypatch.setattr(Texts, "records", records)
    monkeypatch.setattr(Model, "embed_tokens", vectors)
    monkeypatch.setattr(OwnScorer, "score", lambda self, batch: BatchLoss(1.0, 0))
    monkeypatch.setattr("neobert.inference.pseudo_perplexity.score_documents", score)
    monkeypatch.setattr(mlm_loss, "_BLOCK_DOCUMENTS", 4)
    model = replace(loaded, objective=replace(loaded.objective, answers=f"{__name__}:LENGTHS"))
    pieces = ScoreSettings(max_length=40, batch_tokens=50)
    jobs_of = {
        "embed.npy": lambda texts, out: embed_to_file(loaded, texts, out, EmbedSettings(chunk_texts=4)),
        "predict.jsonl": lambda texts, out: predict_to_file(model, texts, out, PredictSettings(chunk_texts=4)),
        "loss.json": lambda texts, out: measure_mlm_loss(OwnScorer(loaded), texts, LossSettings(), out),
        "scores.jsonl": lambda texts, out: pseudo_perplexity_to_file(loaded, texts, out, pieces),
    }
    for name, work in jobs_of.items():
        found = []
        for count in (8, 800):
            file = tmp_path / f"{count}.jsonl"
            file.write_text("".join(json.dumps({"text": f"the cat sees {n} stones"}) + "\n" for n in range(count)))
            Counted.most = Counted.alive
            with open_texts(str(file)) as texts:
                work(texts, tmp_path / f"{count}-{name}")
            found.append(Counted.most)
        assert 0 < found[1] == found[0] <= 8, (name, found)


def test_the_memory_of_a_summary_does_not_grow_with_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neobert.inference.pseudo_perplexity._ROWS_AT_ONCE", 16)
    peaks = []
    for count in (20, 20, 2000):  # The first makes what is made once.
        file = tmp_path / "scores.jsonl"
        file.write_text("".join(json.dumps({"num_tokens": 5, "nll": n % 7}) + "\n" for n in range(count)))
        tracemalloc.start()
        summarize(file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 60_000, peaks
