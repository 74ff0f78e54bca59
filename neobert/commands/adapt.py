"""A trained encoder is adapted to a domain or a language: new tokens from own text, then training on it.

1. `held_out/`: of every text the documents that are measured on and never trained on.
2. `extended/`: the tokenizer with new pieces, and the weights with rows for them; `model.init_from` accepts it.
3. `embeddings/`, then `training/`: two runs of `neobert pretrain`, the first of which trains the rows of tokens only.
4. `measured/`, `result.json`, `result.txt`: the model before, extended and after, on every held-out text.

A step that is done is not made again, so the same command continues where it was.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.cli import print_result, say
from neobert.commands.adaptation_result import describe_result, measure_models
from neobert.commands.extended_folder import describe_extension, read_extension, write_extension
from neobert.commands.staged_run import Pipeline, run_pipeline
from neobert.commands.stages import Stage
from neobert.config.load import load_config, split_arguments
from neobert.config.nesting import parse_json
from neobert.config.schema import DatasetSection, TokenizerSection
from neobert.data.new_pieces import check_extensible
from neobert.data.source.documents import TextDocuments
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import SourceSpec, describe_source
from neobert.data.source.splits import choose_eval_split, choose_train_split
from neobert.data.source.text import cut_text
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.disk import only_writer, write_json, write_text
from neobert.errors import DataError, StartupError
from neobert.inference.mlm_loss import LossSettings
from neobert.inference.scorer import load_scorer
from neobert.weights.encoder_weights import EncoderWeights, find_weights, load_encoder_weights
from neobert.weights.new_rows import INITIAL_ROWS

REQUEST_FILE = "adapt.json"
"""Of what the output was made."""

_TEXT_CHARS = 1_000_000
"""Longer documents are cut, at white space, before they are looked through for new tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptRequest:
    """What decides about texts, tokens and rows. A folder belongs to one request."""

    model: str
    text: tuple[str, ...]
    general: tuple[str, ...] = ()
    text_column: str | None = None
    new_tokens: int = 1000
    documents: int | None = None
    """Documents of each own text that new tokens are learned from; None: all."""

    init: str = "fvt"
    general_fraction: float = 0.5
    """Of the tokens that are trained on."""

    general_documents: int | None = None
    held_out: int = 100
    general_held_out: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.init not in INITIAL_ROWS:
            raise StartupError(f"--init: {self.init!r} is unknown; write one of {', '.join(INITIAL_ROWS)}")
        if not 0 < self.general_fraction < 1:
            raise StartupError(f"--general-fraction: {self.general_fraction}; write a fraction between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptTraining:
    """How it is trained: what `neobert pretrain` is called with."""

    config: str
    overrides: tuple[str, ...]
    embedding_steps: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AdaptText:
    """One of the texts."""

    name: str
    """`own`, `own-2`, `general`, ..."""

    spec: SourceSpec
    is_own: bool
    documents: TextDocuments
    held_out: tuple[str, ...]
    num_before: int
    """Documents of the training split that are held out: its first ones, none where there is a split for it."""

    split: str
    """Of training."""

    has_eval_split: bool

    @property
    def mixture_entry(self) -> dict[str, Any]:
        """As an entry of `dataset.mixture`."""
        where = {"path": list(self.spec.path)} if self.spec.path else {"name": self.spec.name}
        column = {} if self.spec.text_column is None else {"text_column": self.spec.text_column}
        most = {} if self.spec.max_documents is None else {"max_documents": self.spec.max_documents}
        return {**where, "split": self.split, **column, **most}


def run_adapt(
    request: AdaptRequest, training: AdaptTraining, output: Path, *, probe_sets: Sequence[str], piece_chars: int
) -> int:
    """Runs the steps that are not done, and prints the table; returns an exit code of the training commands.

    Raises:
        UserError: the request cannot be met, or the output is of another one.
    """
    stages = _build_stages(request, training, output, ())
    check_typed(training.overrides)
    for stage in stages:  # Every key is right before anything is read.
        config = load_config(str(stage.config), stage.overrides)
    weights = load_encoder_weights(request.model)
    tokenizer = check_start(request, weights)
    settings = LossSettings(whole_words=True, piece_chars=piece_chars)
    found = dataclasses.replace(request, model=str(weights.folder.resolve()))
    check_output(output, found)
    texts = find_texts(request, config.dataset)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"--output: {output} cannot be made ({error.strerror})") from error
    with only_writer(output):
        write_json(output / REQUEST_FILE, dataclasses.asdict(found))
        for text in texts:
            _write_held_out(output / "held_out" / f"{text.name}.jsonl", text.held_out)
        extended = output / "extended"
        if not extended.is_dir():
            write_extension(
                weights,
                tokenizer,
                _learning_texts(request, texts),
                extended,
                num_new=request.new_tokens,
                init=request.init,
                seed=request.seed,
                samples=[document for text in texts for document in text.held_out],
            )
        say(describe_extension(extended))
        held_out = {text.name: output / "held_out" / f"{text.name}.jsonl" for text in texts}
        models = {"before": weights.folder, "extended": extended}
        measured = output / "measured"
        measure_models(models, held_out, measured, settings, probe_sets)  # What cannot be measured is said now.
        pipeline = Pipeline(output=output, stages=_build_stages(request, training, output, texts))
        if code := run_pipeline(pipeline, dry_run=False):
            return code
        models["after"] = find_weights(output / "training")
        result = {
            "sources": {text.name: text.spec.label for text in texts},
            "extension": read_extension(extended),
            **measure_models(models, held_out, measured, settings, probe_sets),
        }
        write_json(output / "result.json", result)
        write_text(output / "result.txt", describe_result(result) + "\n")
    print_result(describe_result(result))
    say(f"the adapted model is {output / 'training'}")
    return 0


def check_start(request: AdaptRequest, weights: EncoderWeights) -> Tokenizer:
    """The tokenizer of the weights, if both can be extended.

    Raises:
        UserError: they cannot, or do not belong together.
    """
    if weights.tokenizer is None:
        raise StartupError(f"{request.model} has no tokenizer.json; put the one it was trained with beside its weights")
    tokenizer = load_tokenizer(TokenizerSection(path=str(weights.tokenizer)))
    if tokenizer.size > weights.config.vocab_size:
        raise StartupError(
            f"{request.model}: its tokenizer has {tokenizer.size:,} tokens and its embedding "
            f"{weights.config.vocab_size:,} rows, so they do not belong together; put the tokenizer it was trained "
            "with beside its weights"
        )
    check_extensible(tokenizer)
    load_scorer(request.model)  # Says where it fills no masks.
    return tokenizer


def check_output(output: Path, request: AdaptRequest) -> None:
    """Raises where there is something else than the work of this request.

    Raises:
        StartupError: naming what differs.
    """
    file, ours = output / REQUEST_FILE, parse_json(json.dumps(dataclasses.asdict(request)))
    if file.is_file():
        theirs = parse_json(file.read_text())
        found = [
            f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in ours if theirs.get(name) != ours[name]
        ]
        if found:
            raise StartupError(
                f"--output: {output} was started with other arguments ({'; '.join(found)}); use those, or another "
                "folder"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StartupError(f"--output: {output} exists already; choose another folder, or remove it")


def _write_held_out(file: Path, texts: Sequence[str]) -> None:
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


# ---- the texts ----


def find_texts(request: AdaptRequest, section: DatasetSection) -> list[AdaptText]:
    """Own texts, then general ones, each with its held-out documents, read as `section` says.

    Raises:
        DataError: one is not there, is no text, or has too few documents.
    """
    found = []
    for is_own, sources in ((True, request.text), (False, request.general)):
        for number, source in enumerate(sources, start=1):
            name = ("own" if is_own else "general") + (f"-{number}" if number > 1 else "")
            spec = dataclasses.replace(describe_source(source, text_column=request.text_column), section=section)
            if not is_own and request.general_documents is not None:
                spec = dataclasses.replace(spec, max_documents=request.general_documents)
            held_out = request.held_out if is_own else request.general_held_out
            found.append(_find_text(name, spec, held_out, is_own=is_own))
    return found


def _find_text(name: str, spec: SourceSpec, num_held_out: int, *, is_own: bool) -> AdaptText:
    splits = list_splits(spec)
    train = choose_train_split(list(splits), None)
    evaluation = choose_eval_split(list(splits), train)
    documents = splits[train](None).as_text(spec.label)
    source = documents if evaluation is None else splits[evaluation](None).as_text(spec.label)
    held_out = tuple(_read(source, 0, num_held_out))
    num_before = num_held_out if evaluation is None else 0
    flag = f"--{'' if is_own else 'general-'}held-out: {num_held_out}"
    try:
        has_more = next(_read(documents, num_before, None), None) is not None
    except DataError as error:
        raise DataError(f"{flag} holds out every document of {spec.label} ({error}); lower it") from error
    if not held_out or not has_more:
        raise DataError(f"{flag}: {spec.label} has no text left to {'train on' if held_out else 'measure'}; change it")
    return AdaptText(
        name=name,
        spec=spec,
        is_own=is_own,
        documents=documents,
        held_out=held_out,
        num_before=num_before,
        split=train if evaluation is not None else f"{train}[{num_before}:]",
        has_eval_split=evaluation is not None,
    )


def _read(documents: TextDocuments, first: int, last: int | None) -> Iterator[str]:
    span = documents.slice(first, last, size=documents.count(), is_cap=True)
    yield from (record.text for record in documents.records(span) if record.text is not None)


def _learning_texts(request: AdaptRequest, texts: Sequence[AdaptText]) -> Iterator[str]:
    for text in texts:
        if text.is_own:
            last = None if request.documents is None else text.num_before + request.documents
            for document in _read(text.documents, text.num_before, last):
                yield from cut_text(document, _TEXT_CHARS)


# ---- the training ----

_REPLACED = (
    *(f"dataset.{name}" for name in ("path", "name", "train_split", "eval_split", "validation_split", "text_column")),
    *(f"tokenizer.{name}" for name in ("path", "name", "vocab_size", "train_documents")),
    "model.vocab_size",
)
"""What a config may say of other texts and another vocabulary."""


def check_typed(overrides: Sequence[str]) -> None:
    """Raises for a key whose value an adaptation says otherwise.

    Raises:
        StartupError: naming what to write instead.
    """
    flags = {"dataset.text_column": "--text-column", "dataset.eval_samples": "--general-held-out", "seed": "--seed"}
    decided = {*_REPLACED, *flags, "dataset.mixture", "dataset.mixture_alpha", "model.init_from", "trainer.output_dir"}
    decided |= {"dataset.streaming", "dataset.pre_tokenize_output", "tokenizer.train", "trainer.trained_weights"}
    for key, _ in split_arguments(overrides)[0]:
        if key in decided:
            instead = flags.get(key, "what --help lists")
            raise StartupError(f"{key}: an adaptation decides it from its own arguments; write {instead}")


def _build_stages(
    request: AdaptRequest, training: AdaptTraining, output: Path, texts: Sequence[AdaptText]
) -> tuple[Stage, ...]:
    """The embeddings first, then everything; without texts only to check the config."""
    entries = [text.mixture_entry for text in texts] or [{"path": path} for path in (*request.text, *request.general)]
    mixing = []
    if len(entries) > 1:
        num_own = len(request.text)
        own = (1 - request.general_fraction if request.general else 1) / num_own
        for number, entry in enumerate(entries):
            entry["weight"] = own if number < num_own else request.general_fraction / len(request.general)
        mixing.append("dataset.mixture_alpha=0")
    held_out = any(text.has_eval_split for text in texts)
    common = [
        *mixing,
        "dataset.streaming=false",
        f"dataset.pre_tokenize_output={output / 'tokenized'}",
        f"dataset.eval_samples={request.general_held_out if held_out else 'null'}",
        *training.overrides,
        f"dataset.mixture={json.dumps(entries)}",
        *(f"{key}=null" for key in _REPLACED),
        "tokenizer.train=false",
    ]
    alone = [
        "trainer.trained_weights=embeddings",
        *(f"trainer.{budget}=null" for budget in ("max_tokens", "num_train_epochs")),
        f"trainer.max_steps={training.embedding_steps}",
        f"seed={request.seed + 1}",  # Other rows than those that the training begins with.
    ]
    extended = f"model.init_from={output / 'extended'}"
    first = Stage(name="embeddings", run="pretrain", config=training.config, overrides=(*common, *alone, extended))
    rest = (*common, f"seed={request.seed}", *([] if training.embedding_steps else [extended]))
    second = Stage(name="training", run="pretrain", config=training.config, overrides=rest)
    return (first, second) if training.embedding_steps else (second,)
