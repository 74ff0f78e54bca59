"""Documents tokenised once, into a folder that is then read by index.

Documents stay in source order, and memory is bounded by a few batches, whatever the size of the corpus. All work is
done in `.tmp-<name>/` beside the folder:

    lock             held while a process works there
    progress.json    the finished files, and the cursor after the last document in them
    output/          becomes the folder, by one rename, when it is complete

A start that finds progress for the same documents, tokenizer and settings continues after it. Where files end depends
on the tokens alone, so the bytes are those of a reading that was never interrupted.

Progress is a bar on a terminal, and a line now and then elsewhere.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from neobert.data.rows.lanes import IntArray, State
from neobert.data.source.documents import Documents, EncodedDocument
from neobert.data.source.text import WHOLE, RecordCounts, Span
from neobert.data.store.arrow import read_manifest
from neobert.data.store.token_folder import (
    UNNAMED,
    Origin,
    PrepareSettings,
    TokenWriter,
    choose_token_type,
    describe_differences,
    make_identity,
    write_description,
)
from neobert.data.tokenizer import Tokenizer
from neobert.disk import locked, sync, write_json
from neobert.errors import DataError
from neobert.secrets import scrub
from neobert.terminal import build_progress, is_interactive

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Meter:
    """Shows documents, tokens, tokens per second, and the fraction done where the size is known.

    Used as a context; the numbers passed to `show` are totals, those before the first call do not count for the speed.
    """

    def __init__(self, label: str, *, console: Console | None = None) -> None:
        self._label = label = scrub(label)
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._is_shown = is_interactive(self._console)
        self._progress = build_progress(self._console, transient=True, counts=False)
        self._task = self._progress.add_task(label, total=None, notes=())
        self._first_tokens: int | None = None
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, documents: int, tokens: int, fraction: float | None) -> None:
        """Totals so far; cheap enough to be called for every document."""
        now = time.monotonic()
        if self._first_tokens is None:
            self._first_tokens, self._started = tokens, now
        if now - self._shown < (0.2 if self._is_shown else LINE_SECONDS):
            return
        self._shown = now
        speed = (tokens - self._first_tokens) / max(now - self._started, 1e-9)
        notes = (f"{documents:,} documents,", f"{tokens:,} tokens,", f"{speed:,.0f} tokens/s")
        if self._is_shown:
            self._progress.update(self._task, notes=notes, completed=fraction, total=None if fraction is None else 1.0)
            return
        done = "" if fraction is None else f" ({fraction:.0%})"
        self._console.print(f"{self._label}: {' '.join(notes)}{done}", soft_wrap=True, markup=False)


_PART_NUMBERS = 1 << 40
"""Document numbers of part i start at i times this: they rise over all parts, without knowing the parts before."""


@dataclass(kw_only=True, slots=True)
class _Progress:
    """What is finished: the state of the writing at the end of a file."""

    cursor: State | None = None
    num_documents: int = 0
    num_pieces: int = 0
    num_tokens: int = 0
    bad: int = 0
    skipped: int = 0
    empty: int = 0
    """Documents whose text gives no token."""

    short: int = 0
    token_type: str = "int32"
    """Of the tokens on disk; earlier versions, which did not note it, wrote this one."""

    files: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Preparation:
    """Everything that decides what is written."""

    documents: Documents
    span: Span
    tokenizer: Tokenizer
    folder: Path
    settings: PrepareSettings
    origin: Origin
    part: tuple[int, int] | None
    label: str | None

    @property
    def work(self) -> Path:
        return work_folder(self.folder)

    def identity(self) -> dict[str, Any]:
        return make_identity(self.documents.fingerprint, self.tokenizer, self.settings, self.part)


def work_folder(folder: Path) -> Path:
    """Where a folder is while it is unfinished."""
    return folder.with_name(f".tmp-{folder.name}")


def prepare_tokens(
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    settings: PrepareSettings,
    *,
    span: Span = WHOLE,
    origin: Origin = UNNAMED,
    part: tuple[int, int] | None = None,
    replace_other: bool = True,
    label: str | None = None,
) -> dict[str, Any]:
    """Makes `folder` hold documents as tokens, or finds that it does; returns its manifest.

    Args:
        span: which of the documents to write.
        part: (number from 0, count), where the folder is one of several that are joined later.
        replace_other: whether a folder of ours with other documents or settings is replaced; else it is an error.
        label: shows the progress under this name; None is silent.

    Raises:
        DataError: too many bad records, no usable document, or the folder holds something else.
    """
    job = _Preparation(
        documents=documents,
        span=span,
        tokenizer=tokenizer,
        folder=folder,
        settings=settings,
        origin=origin,
        part=part,
        label=label,
    )
    if (found := _find(job, replace_other)) is not None:
        if job.work.exists():  # Killed after the last rename, or another process is at work there.
            with suppress(DataError), locked(job.work):
                shutil.rmtree(job.work)
        return found
    with locked(job.work):
        if (found := _find(job, replace_other)) is not None:  # Written by another process in the meantime.
            shutil.rmtree(job.work)
            return found
        try:
            manifest = _write(job, _load_progress(job, replace_other))
        except BaseException:
            if not read_progress(job.work).get("files"):
                shutil.rmtree(job.work)
            raise
        if folder.exists():
            folder.rename(job.work / "replaced")
        (job.work / "output").rename(folder)
        sync(folder.parent)
        shutil.rmtree(job.work)
    return manifest


def _find(job: _Preparation, replace_other: bool) -> dict[str, Any] | None:
    """The manifest of a folder that is complete already.

    Raises:
        DataError: the folder is there and may not be replaced.
    """
    found, expected = read_manifest(job.folder), job.identity()
    if found is None and job.folder.exists():
        raise DataError(f"{job.folder} is in the way: tokenised data is to be written there; move it or remove it")
    if found is None:
        return None
    differences = describe_differences(found, expected)
    if differences and not replace_other:
        raise DataError(f"{job.folder} holds other data ({differences}); choose another folder, or remove that one")
    return None if differences else found


def _load_progress(job: _Preparation, replace_other: bool) -> _Progress:
    """What an interrupted writing has finished; files beyond that are removed.

    Raises:
        DataError: it was made with other settings, and may not be replaced.
    """
    saved = read_progress(job.work)
    output = job.work / "output"
    if saved:
        differences = describe_differences(saved.pop("identity"), job.identity())
        if differences and saved["files"] and not replace_other:
            raise DataError(
                f"{job.work} holds an unfinished writing of other data ({differences}); finish that one with its own "
                "settings, or remove the folder"
            )
        sizes = {name: entry["bytes"] for name, entry in saved["files"].items()}
        if not differences and all((output / n).is_file() and (output / n).stat().st_size == sizes[n] for n in sizes):
            for path in output.iterdir():
                if path.name not in sizes:
                    path.unlink()
            return _Progress(**saved)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    progress = _Progress(token_type=choose_token_type(job.tokenizer.size))
    _save_progress(job, progress)
    return progress


def read_progress(work: Path) -> dict[str, Any]:
    """What a work folder holds of an unfinished writing: its `identity`, and the state after its last whole file."""
    path = work / "progress.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _save_progress(job: _Preparation, progress: _Progress) -> None:
    write_json(job.work / "progress.json", asdict(progress) | {"identity": job.identity()})


def _write(job: _Preparation, progress: _Progress) -> dict[str, Any]:
    """Writes what is missing of the folder, and its description; returns the manifest."""
    settings, tokenizer, output = job.settings, job.tokenizer, job.work / "output"
    writer = TokenWriter(
        output,
        around=(tokenizer.cls_id, tokenizer.sep_id) if settings.special_tokens else None,
        special_tokens_mask=settings.special_tokens_mask,
        document_numbers=settings.max_length is not None,
        file_tokens=settings.file_tokens,
        token_type=progress.token_type,
        files=progress.files,
    )
    first_number = job.part[0] * _PART_NUMBERS if job.part else 0
    total = job.documents.count(job.span)
    with Meter(job.label) if job.label else nullcontext() as meter:
        for document in _documents(job, progress):
            pieces = cut_tokens(document.tokens, settings.row_tokens)
            finished = writer.add(pieces, first_number + progress.num_documents)
            progress.num_documents += 1
            progress.num_pieces += len(pieces)
            progress.num_tokens += len(document.tokens)
            if finished:
                progress.cursor, progress.files = document.cursor, writer.files
                _save_progress(job, progress)
            if meter is not None:
                meter.show(progress.num_documents, progress.num_tokens, _fraction_done(settings, progress, total))
    if not progress.num_documents and job.part is None:
        raise DataError(
            f"the source has no usable documents ({progress.bad} cannot be read, {progress.skipped} without text, "
            f"{progress.short} with fewer than {settings.min_tokens} tokens); check dataset.path and "
            "dataset.text_column"
        )
    writer.finish_file()
    manifest = _make_manifest(job, progress, writer.files)
    write_description(output, files=list(writer.files), features=writer.features, manifest=manifest)
    return manifest


def _documents(job: _Preparation, progress: _Progress) -> Iterator[EncodedDocument]:
    """The documents that are still to be written; `progress` counts what is skipped on the way."""
    settings = job.settings
    if progress.num_documents == settings.max_documents:
        return
    counts = RecordCounts(max_bad=settings.max_bad_records, where="the source")
    counts.bad, counts.skipped = progress.bad, progress.skipped
    span, limit = job.span.beyond(progress.cursor), settings.max_document_chars
    with closing(job.documents.open(span, job.tokenizer.encode_batch, counts, limit, num_ahead=2)) as documents:
        for document in documents:
            progress.bad, progress.skipped = document.bad, document.skipped
            if not len(document.tokens):
                progress.empty += 1
            elif len(document.tokens) < settings.min_tokens:
                progress.short += 1
            else:
                yield document
                if progress.num_documents == settings.max_documents:
                    return
    progress.bad, progress.skipped = counts.bad, counts.skipped


def cut_tokens(tokens: IntArray, row_tokens: int | None) -> list[IntArray]:
    """Consecutive pieces of at most `row_tokens` tokens.

    >>> [piece.tolist() for piece in cut_tokens(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    if row_tokens is None or len(tokens) <= row_tokens:
        return [tokens]
    return [tokens[start : start + row_tokens] for start in range(0, len(tokens), row_tokens)]


def _fraction_done(settings: PrepareSettings, progress: _Progress, total: int | None) -> float | None:
    if settings.max_documents is not None:
        return progress.num_documents / settings.max_documents
    passed = progress.num_documents + progress.bad + progress.skipped + progress.empty + progress.short
    return passed / total if total else None


def _make_manifest(job: _Preparation, progress: _Progress, files: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer = job.tokenizer
    return job.identity() | {
        "source_label": job.origin.source,
        "source_revision": job.origin.revision,
        "tokenizer_name": job.origin.tokenizer,
        "special_ids": {"cls": tokenizer.cls_id, "sep": tokenizer.sep_id, "unk": tokenizer.unk_id},
        "num_documents": progress.num_documents,
        "num_pieces": progress.num_pieces,
        "num_tokens": progress.num_tokens,
        "bad": progress.bad,
        "skipped": progress.skipped + progress.empty,
        "short": progress.short,
        "token_type": progress.token_type,
        "files": dict(files),
    }
