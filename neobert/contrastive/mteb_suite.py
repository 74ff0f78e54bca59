"""An encoder on tasks of mteb, by mteb's own protocol; results stay in a folder, and finished tasks are skipped.

`<output>/results/<model>/<digest>/<task>.json` is what mteb writes. The digest is of weights, tokenizer, dtype,
pooling, length and prefixes, so each checkpoint and each way of using it has a folder of its own; `protocol.json` there
says which. The same command continues after an interruption.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mteb
import torch
from mteb.abstasks import AbsTask
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import MultiVectorSearchEncoderWrapper
from mteb.results.model_result import ModelResult
from torch import Tensor

from neobert.config.nesting import parse_json
from neobert.contrastive.mteb_tasks import choose_named_tasks, choose_tasks_of_types, find_benchmark
from neobert.disk import write_text
from neobert.errors import DataError
from neobert.inference.text_encoder import TextEncoder, Vectors, load_text_encoder
from neobert.objectives.late_interaction import TOKENS, TokenVectors, max_sim
from neobert.weights.folder import is_step_name

_LOADER_ROWS = 256
"""Texts that mteb's loaders hand over at a time; the encoder makes its own batches of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MtebRequest:
    """What to evaluate, and on what. Exactly one of `tasks`, `task_types` and `benchmark` is set."""

    model: str
    output: Path
    tasks: tuple[str, ...] = ()
    """Names of mteb, local files and folders."""

    task_types: tuple[str, ...] = ()
    benchmark: str | None = None
    languages: tuple[str, ...] | None = None
    """Three-letter codes; None is all of a task that is named, and English tasks of a type."""

    split: str | None = None
    """Of local folders; None is test, or validation where there is no test."""

    device: str = "auto"
    dtype: str = "auto"
    weights: str = "model"
    pooling: str | None = None
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One task."""

    task: str
    type: str
    metric: str
    score: float
    """Mean over its splits and languages, as mteb takes it."""

    seconds: float
    skipped: bool
    """Finished before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MtebReport:
    """What a call found."""

    folder: Path
    scores: tuple[TaskScore, ...]
    summary: dict[str, float | None]
    """mteb's own averages of a benchmark all of whose tasks are there; empty without one."""

    failures: dict[str, str]
    """Task -> reason."""

    def describe(self) -> str:
        """The table, for people."""
        rows = [(x.task, x.type, x.metric, f"{x.score:.4f}", _describe_time(x)) for x in self.scores]
        rows += [
            (name, "", "", "none" if value is None else f"{value:.4f}", "") for name, value in self.summary.items()
        ]
        table = [("task", "type", "metric", "score", "seconds"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def _describe_time(score: TaskScore) -> str:
    return f"{score.seconds:.0f}{' (before)' if score.skipped else ''}"


class MtebEncoder(AbsEncoder):
    """An encoder as mteb calls one. Its rule chooses the prefix: by task, by type, or for queries and documents."""

    def __init__(self, encoder: TextEncoder, meta: ModelMeta) -> None:
        self.encoder, self.mteb_model_meta = encoder, meta
        self.model_prompts = dict(encoder.settings.prompts)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Vectors:
        texts = [text for batch in inputs for text in batch["text"]]
        name = self.get_prompt_name(task_metadata, prompt_type)
        return self.encoder.embed(texts, prefix=self.model_prompts[name] if name else "")


class MtebLateInteraction(MultiVectorSearchEncoderWrapper):
    """An encoder that keeps the vectors of all tokens, as mteb searches with one. Tasks without a search need one
    vector a text, and mteb refuses them."""

    corpus_chunk_size = 2000
    """Documents whose vectors are held at once."""

    def __init__(self, encoder: TextEncoder, meta: ModelMeta) -> None:
        self.mteb_model_meta, self._dense = meta, MtebEncoder(encoder, meta)

    def _encode(self, inputs: Any, **options: Any) -> list[Tensor]:
        vectors = self._dense.encode(inputs, **options)
        assert isinstance(vectors, TokenVectors), "its pooling is tokens"
        return [text.tokens_TD for text in vectors.split(1)]

    def similarity(self, queries: Sequence[Tensor], documents: Sequence[Tensor]) -> Tensor:
        """MaxSim of all queries and documents, `[Q, C]`."""
        return max_sim(_side_by_side(queries), _side_by_side(documents))


def _side_by_side(texts: Sequence[Tensor]) -> TokenVectors:
    return TokenVectors(torch.cat(list(texts)), torch.tensor([len(text) for text in texts]))


def run_mteb(request: MtebRequest) -> MtebReport:
    """Evaluates a model on tasks, without those whose results are there.

    Raises:
        DataError: a task is not there, or a local set cannot be used.
        WeightsError: there is no model.
    """
    benchmark, tasks = _choose_tasks(request)
    encoder = load_text_encoder(
        request.model,
        device=request.device,
        dtype=request.dtype,
        weights=request.weights,
        pooling=request.pooling,
        max_length=request.max_length,
    )
    meta = _describe_model(request.model, encoder)
    cache = mteb.ResultCache(request.output)
    folder = cache.get_task_result_path(tasks[0].metadata.name, meta).parent
    before = {task.metadata.name for task in tasks if _is_finished(folder, task)}
    _write_protocol(folder, request, encoder)
    wrap = MtebLateInteraction if encoder.settings.pooling == TOKENS else MtebEncoder
    found = mteb.evaluate(
        wrap(encoder, meta),
        tasks,
        cache=cache,
        raise_error=False,
        co2_tracker=False,
        encode_kwargs={"batch_size": _LOADER_ROWS, "show_progress_bar": False},
        show_progress_bar=sys.stderr.isatty(),
    )
    metadata = {task.metadata.name: task.metadata for task in tasks}
    scores = [
        TaskScore(
            task=result.task_name,
            type=metadata[result.task_name].type,
            metric=metadata[result.task_name].main_score,
            score=float(result.get_score()),
            seconds=float(result.evaluation_time or 0),
            skipped=result.task_name in before,
        )
        for result in found.task_results
    ]
    failures = {error.task_name: error.exception for error in found.exceptions or ()}
    summary = {} if benchmark is None or failures else _summarise(benchmark, found)
    return MtebReport(folder=folder, scores=tuple(scores), summary=summary, failures=failures)


def _choose_tasks(request: MtebRequest) -> tuple[Any, Sequence[AbsTask]]:
    """The benchmark, where one is named, and the tasks."""
    if request.benchmark is not None:
        if request.languages is not None:
            raise DataError("--languages: a benchmark has its own; remove it")
        benchmark = find_benchmark(request.benchmark)
        return benchmark, list(benchmark.tasks)
    if request.task_types:
        return None, choose_tasks_of_types(request.task_types, request.languages or ("eng",))
    return None, choose_named_tasks(request.tasks, request.split, request.languages)


def _describe_model(path: str, encoder: TextEncoder) -> ModelMeta:
    folder = Path(path)
    name = f"{folder.parent.parent.name}-{folder.name}" if is_step_name(folder.name) else folder.resolve().name
    several = encoder.settings.pooling == TOKENS
    known = {
        "name": f"local/{name}" if folder.exists() else path.partition("@")[0],
        "revision": encoder.digest()[:16],
        "max_tokens": encoder.settings.max_length,
        "similarity_fn_name": ScoringFunction.MAX_SIM if several else ScoringFunction.COSINE,
    }
    return ModelMeta.create_empty(overwrites=known)


def _is_finished(folder: Path, task: AbsTask) -> bool:
    """Whether there are results of a task. A file that a kill has torn is removed: mteb cannot read it."""
    file = folder / f"{task.metadata.name}.json"
    if not file.is_file():
        return False
    try:
        parse_json(file.read_text(encoding="utf-8"))
    except ValueError:
        file.unlink()
        return False
    return True


def _write_protocol(folder: Path, request: MtebRequest, encoder: TextEncoder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = {"model": request.model, "weights": request.weights, "digest": encoder.digest(), **asdict(encoder.settings)}
    write_text(folder / "protocol.json", json.dumps(known, indent=2, ensure_ascii=False) + "\n")


def _summarise(benchmark: Any, found: ModelResult) -> dict[str, float | None]:
    (scores,) = benchmark.get_score(mteb.BenchmarkResults(model_results=[found])).values()
    return {name: value for name, value in scores.items() if name != "Rank"}  # Among one model.
