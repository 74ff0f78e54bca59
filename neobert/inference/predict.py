"""What a model says of every record of a file, whatever it was trained to answer: one JSON object a record, in order.

A record that cannot be answered has its line too: one without text, one that cannot be read, and one that the model's
answers refuse, as a text without [MASK] where masks are filled. Its line says why, and the job continues.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neobert.disk import check_no_writer, only_writer
from neobert.inference.jobs import (
    JobError,
    TextJob,
    Throughput,
    appending,
    check_absent,
    cut_in_groups,
    progress_file,
)
from neobert.inference.model import Model
from neobert.inference.texts import InputRecord, Texts
from neobert.objectives.base import Answer

CHUNK_CHARS = 1 << 18
"""A group of records ends after this many characters even when it has few texts: an answer may say something of every
token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictSettings:
    """What is asked. Raises ValueError for a size that is not positive."""

    top_k: int = 5
    joint: bool = False
    chunk_texts: int = 256
    """Records of the input between two notes of progress."""

    def __post_init__(self) -> None:
        if self.chunk_texts < 1:
            raise ValueError(f"--chunk-texts: {self.chunk_texts}; write a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictReport:
    """What a job wrote."""

    num_records: int
    """Lines, each of one record of the input."""

    num_texts: int
    """Records with a text."""

    num_refused: int
    """Texts that the model has no answer for; their lines say why."""

    throughput: Throughput


def check_lines_output(output: Path) -> None:
    """Raises JobError when the file has another ending or is complete, DataError when another process is writing it."""
    if output.suffix != ".jsonl":
        raise JobError(f"--output: {output} does not end in .jsonl, and has one JSON object a line; name it so")
    check_no_writer(output)
    if not progress_file(output).is_file():
        check_absent(output)


def predict_to_file(model: Model, texts: Texts, output: Path, settings: PredictSettings) -> PredictReport:
    """Asks a model about an input; see the head of this module.

    Raises:
        JobError: the output is there and complete, or belongs to an unfinished job with other settings.
        ValueError: the model cannot be asked in this way, whatever the text.
        DataError: another process is writing this output.
    """
    check_lines_output(output)
    model.predict([], top_k=settings.top_k, joint=settings.joint)  # What is wrong with every text is said now.
    known = {**asdict(settings), "model": model.digest()}
    with only_writer(output):
        job = TextJob(texts, progress_file(output), known, bytes=0, num_refused=0)
        with appending(job, output) as add:

            def ask(group: Sequence[InputRecord]) -> None:
                lines = _ask_group(model, group, settings)
                asked = [record.text for record in group if record.text is not None]
                job.done["num_texts"] += len(asked)
                job.done["num_tokens"] += sum(map(len, model.tokenizer.encode_batch(asked)))
                job.done["num_refused"] += sum("problem" in x and x["text"] is not None for x in lines)
                add(map(json.dumps, lines))

            throughput = job.run("texts", cut_in_groups(job.records(), settings.chunk_texts, CHUNK_CHARS), ask)
        job.finish()
    counts = {x: job.done[x] for x in ("num_records", "num_texts", "num_refused")}
    return PredictReport(**counts, throughput=throughput)


def _ask_group(model: Model, group: Sequence[InputRecord], settings: PredictSettings) -> list[dict[str, Any]]:
    found = iter(_answer_each(model, [record.text for record in group if record.text is not None], settings))
    lines: list[dict[str, Any]] = []
    for record in group:
        line: dict[str, Any] = {"record": record.number}
        answer = record.problem or "no text" if record.text is None else next(found)
        if isinstance(answer, str):
            lines.append({**line, "text": record.text, "problem": answer})
        else:
            lines.append({**line, **asdict(answer)})
    return lines


def _answer_each(model: Model, texts: Sequence[str], settings: PredictSettings) -> Iterator[Answer | str]:
    """The answer for each text, or why there is none. All are asked at once; where one is refused, each half is asked
    by itself, so that the others stay packed."""
    if not texts:
        return
    try:
        yield from model.predict(texts, top_k=settings.top_k, joint=settings.joint)
    except ValueError as error:
        if len(texts) == 1:
            yield str(error)
            return
        middle = len(texts) // 2
        yield from _answer_each(model, texts[:middle], settings)
        yield from _answer_each(model, texts[middle:], settings)
