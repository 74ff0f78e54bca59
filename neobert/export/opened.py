"""Files of an exported folder, opened by the programs they are for, and compared with our model.

Each file is one row: who opened it, whether its tokenizer gives our ids, how far its outputs are from ours, its size
and its speed on this machine.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from neobert.export.gguf_file import GGUF_FILES, GGUF_PACKAGES, gguf_tensors, read_tensors
from neobert.export.heads import find_head
from neobert.export.llama_folder import LLAMA_FOLDER
from neobert.export.onnx_file import INT8_FILE, ONNX_FILE
from neobert.export.programs import (
    SPEED_TOKENS,
    open_llama_cpp,
    open_llama_model,
    open_onnx,
    open_sentences,
    open_transformers,
)
from neobert.export.samples import SECONDS, TEXTS, wrap_texts
from neobert.export.target_rows import Opened, Reference, TargetRow, compare_tensors

_SPEED_TEXTS = 32


def has_targets(folder: Path) -> bool:
    """Whether a folder has files beside those of the form that transformers loads."""
    return any((folder / kind.path).is_file() for kind in FILES.values() if "/" in kind.path)


def open_files(folder: Path, reference: Reference) -> list[TargetRow]:
    """A row for each file of `folder` whose program is installed."""
    rows = []
    for name, kind in FILES.items():
        if not (folder / kind.path).is_file():
            continue
        if are_installed(kind.packages):
            rows.append(kind.check(name, folder, reference))
        elif kind.otherwise is not None and are_installed(GGUF_PACKAGES):
            rows.append(kind.otherwise(name, folder, reference))
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKind:
    """A kind of file: where it is and who opens it."""

    path: str
    open: Callable[[Path, Reference], Opened]
    packages: tuple[str, ...] = ()
    least_cosine: float | None = None
    """What passes for a file in fewer bits; None asks for equality, as of layers."""

    truncates: bool = True
    """Its program cuts long texts before [SEP], as training does; else long texts are left out."""

    serves: bool = True
    """The program is one that serves this file, so that its speed says something."""

    otherwise: Callable[[str, Path, Reference], TargetRow] | None = None
    """What is done where the packages are not installed."""

    def check(self, name: str, folder: Path, reference: Reference) -> TargetRow:
        opened = self.open(folder, reference)
        head = find_head(reference.weights)
        is_pairs = head is not None and head.num_texts == 2
        chosen = list(range(len(TEXTS)))
        if not self.truncates:
            longest = reference.weights.config.max_position_embeddings
            chosen = [i for i, ids in enumerate(wrap_texts(reference.tokenizer, 1 << 30)) if len(ids) <= longest]
        seconds = [SECONDS[i] for i in chosen] if is_pairs else None
        theirs = opened.run([TEXTS[i] for i in chosen], seconds)
        expected = reference.vector_ids if "vector" in theirs.values else reference.outputs.ids
        ids_equal = theirs.ids == [expected[i] for i in chosen]
        pairs = [
            (reference.outputs.values[key][i], own)
            for key, found in theirs.values.items()
            for i, own in zip(chosen, found)
        ]
        return TargetRow(
            target=name,
            opened_by=opened.by,
            ids_equal=ids_equal,
            num_bytes=sum(file.stat().st_size for file in (folder / self.path).parent.glob(f"{Path(self.path).name}*")),
            tokens_per_second=_measure_speed(opened, reference, is_pairs) if self.serves and ids_equal else None,
            **compare_tensors(pairs, self.least_cosine if ids_equal else math.inf),
        )


def _measure_speed(opened: Opened, reference: Reference, is_pairs: bool) -> float:
    """Tokens per second from text to output, padding not counted."""
    longest = min(SPEED_TOKENS, reference.sentences.max_length, reference.weights.config.max_position_embeddings)
    num_tokens = len(reference.tokenizer.encode_batch([TEXTS[1]])[0])
    most = max(1, (longest - 2) // num_tokens // (2 if is_pairs else 1))
    texts = [" ".join([TEXTS[1]] * (1 + number % most)) for number in range(_SPEED_TEXTS)]
    seconds = texts if is_pairs else None
    opened.run(texts, seconds)
    started = time.perf_counter()
    outputs = opened.run(texts, seconds)
    return sum(map(len, outputs.ids)) / (time.perf_counter() - started)


def _read_gguf(name: str, folder: Path, reference: Reference) -> TargetRow:
    """A GGUF file read back by its own package, where llama.cpp is not installed: tensors alone."""
    path = folder / FILES[name].path
    ours, theirs = gguf_tensors(reference.weights), read_tensors(path)
    pairs = [(x.float(), theirs.get(key, torch.empty(0))) for key, x in ours.items()]
    return TargetRow(
        target=name,
        opened_by=f"gguf {version('gguf')} (tensors alone)",
        ids_equal=None,
        num_bytes=path.stat().st_size,
        tokens_per_second=None,
        **compare_tensors(pairs, FILES[name].least_cosine if set(ours) == set(theirs) else math.inf),
    )


def are_installed(packages: Sequence[str]) -> bool:
    """Whether all of them can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in packages)


_LEAST_COSINES = {"f32": None, "f16": 0.9999, "q8_0": 0.999}
_WEIGHTS, _RUNTIME, _LLAMA_CPP = "model.safetensors", ("onnxruntime",), ("llama_cpp",)

FILES: dict[str, FileKind] = {
    "transformers": FileKind(path="model.safetensors", open=open_transformers),
    "sentence-transformers": FileKind(
        path="model.safetensors", open=open_sentences, packages=("sentence_transformers",)
    ),
    "onnx fp32": FileKind(path=ONNX_FILE, open=open_onnx(ONNX_FILE), packages=_RUNTIME),
    "onnx int8": FileKind(path=INT8_FILE, open=open_onnx(INT8_FILE), packages=_RUNTIME, least_cosine=0.95),
    **{
        f"gguf {name}": FileKind(
            path=path,
            open=open_llama_cpp(path),
            packages=_LLAMA_CPP,
            least_cosine=_LEAST_COSINES[name],
            truncates=False,
            otherwise=_read_gguf,
        )
        for name, path in GGUF_FILES.items()
    },
    "vllm": FileKind(path=f"{LLAMA_FOLDER}/model.safetensors", open=open_llama_model, serves=False),
}
"""What a folder may have, in the order of the table."""
