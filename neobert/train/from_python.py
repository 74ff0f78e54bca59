"""Pretraining that is started from Python, on documents that are in memory."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

from neobert.config.schema import Config
from neobert.errors import DataError
from neobert.train.loop import RunResult
from neobert.train.loop import pretrain as train

if TYPE_CHECKING:
    from datasets import Dataset


def pretrain(config: Config, data: Union["Dataset", Sequence[str], None] = None) -> RunResult:
    """Pretraining, as `neobert pretrain` does it.

    Args:
        data: a Dataset with a column of text, or texts, instead of the source that the config names. They are
            written once to `<trainer.output_dir>-data/<digest of their content>`, which is what the run reads: a start
            with equal data resumes exactly, one with other data is refused.

    Raises:
        DataError: `data` is neither, or empty, or other documents than those of earlier runs of this output folder.
        StartupError: the run cannot start as configured; the message names the key and the remedy.
    """
    if data is None:
        return train(config)
    output_dir = Path(config.trainer.output_dir)
    folder = write_documents(data, output_dir.with_name(f"{output_dir.name}-data"))
    section = replace(config.dataset, path=str(folder), name=None, mixture=(), config=None, revision=None)
    return train(replace(config, dataset=section))


def write_documents(data: Union["Dataset", Sequence[str]], parent: Path) -> Path:
    """The folder in `parent` that holds these documents as `save_to_disk` writes them; written when it is not there.

    Raises:
        DataError: `data` is neither a Dataset nor texts, or empty, or `parent` holds other documents.
    """
    from datasets import Dataset

    if not isinstance(data, Dataset):
        if isinstance(data, str) or not all(isinstance(text, str) for text in data):
            raise DataError("data: pass a datasets.Dataset, or a list of texts (str)")
        data = Dataset.from_dict({"text": list(data)})
    if not len(data):
        raise DataError("data: there are no documents in it; pass at least one")
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    folder = parent / digest.hexdigest()[:16]
    if others := [path for path in parent.glob("[!.]*") if path != folder]:
        raise DataError(
            f"data: the run of this trainer.output_dir was made with other documents, those in {others[0]}; pass them "
            f"to resume it, choose another trainer.output_dir, or remove {parent} to start with these"
        )
    if not folder.is_dir():
        # Every process of a run does this before they know each other: each writes a copy, and the first rename stays.
        temporary = parent / f".tmp-{folder.name}-{secrets.token_hex(4)}"
        try:
            data.flatten_indices().save_to_disk(str(temporary))
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
