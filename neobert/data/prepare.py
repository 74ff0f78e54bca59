"""Tokenise a source of text once, into a folder that is then read by index.

Documents stay whole and in source order; memory is bounded by one batch, whatever the size of the corpus. The folder
appears by a rename when it is complete, with a manifest that says what it was made from, so that it is used again
only for the same documents, tokenizer and settings.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.data.arrow import read_manifest
from neobert.data.encode import encode_documents
from neobert.data.errors import DataError
from neobert.data.text import WHOLE, RecordCounts, Span, TextSource
from neobert.data.token_writer import TokenWriter
from neobert.data.tokenizer import Tokenizer

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """What shapes the folder, besides documents and tokenizer."""

    max_document_chars: int
    max_bad_records: int


def prepare_tokens(
    source: TextSource, tokenizer: Tokenizer, folder: Path, settings: PrepareSettings, span: Span = WHOLE
) -> dict[str, Any]:
    """Makes `folder` hold the source's documents as tokens, or finds that it does; returns its manifest.

    Raises:
        DataError: too many bad records, no usable document, or the folder holds something else.
    """
    wanted = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "span": list(span),
        "tokenizer_digest": tokenizer.digest,
        "max_document_chars": settings.max_document_chars,
        "special_tokens": False,
    }
    found = read_manifest(folder)
    if found is not None and all(found.get(name) == value for name, value in wanted.items()):
        return found
    if found is None and folder.exists():
        raise DataError(f"{folder} is in the way: tokenised data is to be written there; move it or remove it")
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        manifest = _write(source, tokenizer, temporary, settings, wanted, span)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _write(
    source: TextSource,
    tokenizer: Tokenizer,
    folder: Path,
    settings: PrepareSettings,
    wanted: dict[str, Any],
    span: Span,
) -> dict[str, Any]:
    counts = RecordCounts(max_bad=settings.max_bad_records, where="the source")
    writer = TokenWriter(folder)
    for document in encode_documents(source.records(span), tokenizer.encode_batch, counts, settings.max_document_chars):
        if len(document.tokens):
            writer.add(document.tokens)
        else:
            counts.skipped += 1
    if not writer.num_documents:
        raise DataError(
            f"the source has no usable documents ({counts.bad} cannot be read, {counts.skipped} without text); check "
            "dataset.path and dataset.text_column"
        )
    manifest = wanted | {
        "num_documents": writer.num_documents,
        "num_tokens": writer.num_tokens,
        "bad": counts.bad,
        "skipped": counts.skipped,
    }
    writer.close(manifest)
    return manifest
