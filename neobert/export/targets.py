"""What a model can be exported for, beside the folder that transformers loads, which is always made.

A target is one entry of TARGETS: what must be installed, why a model cannot be exported for it, and how its files are
made from the folder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neobert.data.tokenizer import Tokenizer
from neobert.export.forms import Form, choose_family
from neobert.export.gguf_file import GGUF_PACKAGES, tokenizer_problem, write_gguf
from neobert.export.heads import find_head
from neobert.export.llama_folder import LLAMA_POOLING, write_llama
from neobert.export.onnx_file import ONNX_PACKAGES, write_onnx
from neobert.export.opened import are_installed
from neobert.objectives.base import VectorSettings
from neobert.objectives.table import OBJECTIVES
from neobert.weights.encoder_weights import EncoderWeights


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExportPlan:
    """What is exported."""

    weights: EncoderWeights
    """With the vocabulary and the dtype of the export."""

    tokenizer: Tokenizer
    tokenizer_folder: Path
    sentences: VectorSettings
    form: Form
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Something that exported models are for."""

    problem: Callable[[ExportPlan], str | None] = lambda plan: None
    """Why this model cannot be exported for it."""

    write: Callable[[ExportPlan, Path], None] = lambda plan, folder: None
    """Makes its files below the folder; nothing where the folder itself is what is loaded."""

    packages: tuple[str, ...] = ()
    extra: str = ""
    """The extra of this project that installs them."""


def call_problems(targets: Sequence[str]) -> Iterator[str]:
    """What is wrong whatever the model is: names and packages."""
    for name in targets:
        if name not in TARGETS:
            yield f"--for: {name!r} is unknown; write one or more of {','.join(TARGETS)}"
        elif not are_installed(TARGETS[name].packages):
            missing = [package for package in TARGETS[name].packages if not are_installed([package])]
            yield (
                f"--for: {name} needs {', '.join(missing)}, not installed here; pip install -e "
                f"'.[{TARGETS[name].extra}]', or leave it out"
            )


def plan_problems(targets: Sequence[str], plan: ExportPlan) -> list[str]:
    """Why this model cannot be exported for some of them."""
    found = {name: TARGETS[name].problem(plan) for name in targets}
    return [f"--for: {name}: {problem}; leave it out" for name, problem in found.items() if problem is not None]


def _native_problem(plan: ExportPlan) -> str | None:
    if plan.form == "native":
        return None
    return "the folder has code of its own (--format remote_code), and this takes the native form alone"


def _eurobert_problem(plan: ExportPlan) -> str | None:
    family, _ = choose_family(plan.weights.config)
    if plan.form == "native" and family.name != "eurobert":
        return f"the folder has the layout of {family.title}, and this takes that of EuroBERT alone"
    return _native_problem(plan)


def _gguf_problem(plan: ExportPlan) -> str | None:
    head = "a head on labels has no counterpart in llama.cpp's eurobert" if find_head(plan.weights) else None
    return _eurobert_problem(plan) or head or tokenizer_problem(plan.tokenizer)


def _llama_problem(plan: ExportPlan) -> str | None:
    if (problem := _eurobert_problem(plan)) is not None:
        return problem
    if find_head(plan.weights) is not None:
        return "a head on labels has no counterpart in LlamaBidirectionalModel"
    if plan.sentences.pooling not in LLAMA_POOLING:
        known = " and ".join(LLAMA_POOLING)
        return f"LlamaBidirectionalModel pools by {known}, and this model by {plan.sentences.pooling}"
    return None


def _write_onnx(plan: ExportPlan, folder: Path) -> None:
    objective = OBJECTIVES[plan.weights.objective]
    # Contrastive fine-tuning keeps the vocabulary projection, and is for vectors.
    fills_masks = objective.fills_masks and objective.vectors is None
    write_onnx(folder, plan.sentences, find_head(plan.weights), fills_masks=fills_masks)


TARGETS: dict[str, Target] = {
    "transformers": Target(),
    "sentence-transformers": Target(),
    "onnx": Target(problem=_native_problem, write=_write_onnx, packages=ONNX_PACKAGES, extra="onnx"),
    "gguf": Target(
        problem=_gguf_problem,
        write=lambda plan, folder: write_gguf(folder, plan.weights, plan.tokenizer, plan.sentences),
        packages=GGUF_PACKAGES,
        extra="gguf",
    ),
    "vllm": Target(problem=_llama_problem, write=lambda plan, folder: write_llama(folder, plan.sentences.pooling)),
}
