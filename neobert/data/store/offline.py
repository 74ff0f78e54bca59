"""What a run would read, prepared before it: every split it needs, as one folder of tokens for each source.

<folder>/train/ validation/ ...      tokenised splits, each complete or not there
<folder>/dataset_dict.json           names them; written last, so that the folder is read only when it is whole
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from neobert.config.schema_data import DatasetSection, TokenizerSection
from neobert.data.source.documents import Documents, TextDocuments
from neobert.data.source.formats import OpenSplit, list_splits
from neobert.data.source.hub import HubSource
from neobert.data.source.inventory import NO_FILES, Inventory
from neobert.data.source.spec import SourceSpec, describe_sources, name_folders
from neobert.data.source.splits import (
    EVAL_SPLITS,
    SplitSlice,
    check_disjoint,
    check_split,
    choose_eval_split,
    choose_train_split,
    parse_split,
)
from neobert.data.source.text import WHOLE, Span
from neobert.data.store.opening import locate_slice
from neobert.data.store.prepare import prepare_tokens
from neobert.data.store.token_folder import Origin, PrepareSettings, choose_settings, write_json
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError
from neobert.secrets import hide_credentials


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSource:
    """A source that is on disk as tokens."""

    folder: Path
    spec: SourceSpec
    train_split: str
    eval_split: str | None
    manifests: dict[str, dict[str, Any]]
    """By split."""

    inventory: Inventory
    """The files that were read."""


def open_text_split(spec: SourceSpec, requested: str | None, tokenizer: Tokenizer | None) -> tuple[TextDocuments, Span]:
    """A source of text, and where a split of it is; None takes `train`, or the only one there is.

    Raises:
        DataError: it is not there, or is tokenised already.
    """
    splits = list_splits(spec)
    split = parse_split(choose_train_split(list(splits), requested))
    source = splits[split.name](tokenizer).as_text(spec.label)
    return source, _locate_text(source, split, None)


def _locate_text(source: TextDocuments, split: SplitSlice, max_documents: int | None) -> Span:
    size = source.count()
    if size is None and split.needs_size:
        size = sum(1 for _ in source.records())  # Reads the source once; it is about to be tokenised anyway.
    return locate_slice(source, split, max_documents, size=size)


def prepare_sources(
    section: DatasetSection,
    tokenizer: Tokenizer,
    output: Path,
    *,
    tokenizer_name: str | None,
    min_tokens: int | None = None,
) -> list[PreparedSource]:
    """Tokenises every source of `dataset.*`: to `output`, or to one folder in it for each of several.

    Args:
        min_tokens: keeps only training documents with at least so many tokens; sources may then be tokens already.

    Raises:
        DataError: a source cannot be used; nothing is tokenised before all of them were looked at.
    """
    specs = describe_sources(section)
    plans = [
        _plan(spec, section, tokenizer, folder, min_tokens) for spec, folder in zip(specs, name_folders(specs, output))
    ]
    return [_prepare(plan, tokenizer, tokenizer_name) for plan in plans]


def data_overrides(prepared: Sequence[PreparedSource], section: DatasetSection) -> list[str]:
    """The overrides that make a run with this `dataset` section read the prepared folders instead."""
    overrides = ["dataset.streaming=false"]
    if section.pre_tokenize:
        overrides.append("dataset.pre_tokenize=false")
    if len(prepared) == 1:
        (source,) = prepared
        overrides.append(f"dataset.path={source.folder}")
        if section.train_split is not None:
            overrides.append(f"dataset.train_split={source.train_split}")
    else:
        overrides += [f"dataset.mixture={_write_mixture(prepared)}", "dataset.path=null", "dataset.train_split=null"]
    if section.eval_split is not None:
        overrides.append(f"dataset.eval_split={next((p.eval_split for p in prepared if p.eval_split), None)}")
    return overrides


def describe_origin(spec: SourceSpec, documents: object, tokenizer_name: str | None) -> Origin:
    """Text for the manifest. Of a path only the last part: the folder may be moved, and be passed on to others."""
    return Origin(
        source=", ".join(last_part(hide_credentials(path)) for path in spec.path) if spec.path else spec.name,
        revision=documents.commit if isinstance(documents, HubSource) else spec.revision,
        tokenizer=tokenizer_name,
    )


def name_tokenizer(section: TokenizerSection) -> str | None:
    """A short name of the tokenizer, without the folders above it."""
    return section.name if section.path is None else last_part(section.path)


def last_part(path: str) -> str:
    return Path(path.rstrip("/")).name


def describe_tokenizer(argument: str) -> TokenizerSection:
    """A tokenizer as one argument of a command line: a folder that exists or looks like one, else a hub name."""
    is_path = Path(argument).expanduser().exists() or argument.startswith((".", "/", "~"))
    return TokenizerSection(path=str(Path(argument).expanduser())) if is_path else TokenizerSection(name=argument)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _SplitPlan:
    """A split that was looked at; nothing of it is written."""

    documents: Documents
    span: Span
    settings: PrepareSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _SourcePlan:
    """A source whose splits were looked at."""

    spec: SourceSpec
    folder: Path
    train_split: str
    eval_split: str | None
    splits: dict[str, _SplitPlan]


def _plan(
    spec: SourceSpec, section: DatasetSection, tokenizer: Tokenizer, folder: Path, min_tokens: int | None
) -> _SourcePlan:
    splits = list_splits(spec)
    names = list(splits)
    train = parse_split(choose_train_split(names, spec.split))
    settings = choose_settings(section, spec, train, spec.max_documents)
    settings = replace(settings, min_tokens=min_tokens or 0)
    plans = {train.name: _plan_split(spec, splits, train, tokenizer, settings, stored_allowed=min_tokens is not None)}
    requested, evaluation = section.eval_split or choose_eval_split(names, train.name), None
    if requested is not None:
        check_split(names, requested, "dataset.eval_split")
        split = parse_split(requested)
        check_disjoint(train, split, lambda: splits[train.name](tokenizer).count())
        # Two slices of one split need two names.
        evaluation = split.name if split.name != train.name else EVAL_SPLITS[0]
        settings = choose_settings(section, spec, split, None)
        stored = min_tokens is not None
        plans[evaluation] = _plan_split(spec, splits, split, tokenizer, settings, stored_allowed=stored)
    return _SourcePlan(spec=spec, folder=folder, train_split=train.name, eval_split=evaluation, splits=plans)


def _plan_split(
    spec: SourceSpec,
    splits: Mapping[str, OpenSplit],
    split: SplitSlice,
    tokenizer: Tokenizer,
    settings: PrepareSettings,
    *,
    stored_allowed: bool,
) -> _SplitPlan:
    found = splits[split.name](tokenizer)
    if found.is_tokenised and stored_allowed:
        if not split.is_whole:
            raise DataError(f"{split} is a slice of tokens that are on disk already; name the whole split")
        return _SplitPlan(documents=found, span=WHOLE, settings=settings)
    source = found.as_text(spec.label)
    span = _locate_text(source, split, settings.max_documents)
    return _SplitPlan(documents=source, span=span, settings=settings)


def _prepare(plan: _SourcePlan, tokenizer: Tokenizer, tokenizer_name: str | None) -> PreparedSource:
    manifests = {
        name: prepare_tokens(
            split.documents,
            tokenizer,
            plan.folder / name,
            split.settings,
            span=split.span,
            origin=describe_origin(plan.spec, split.documents, tokenizer_name),
            replace_other=False,
            label=str(plan.folder / name),
        )
        for name, split in plan.splits.items()
    }
    write_json(plan.folder / "dataset_dict.json", {"splits": list(manifests)})
    return PreparedSource(
        folder=plan.folder,
        spec=plan.spec,
        train_split=plan.train_split,
        eval_split=plan.eval_split,
        manifests=manifests,
        inventory=sum((split.documents.inventory for split in plan.splits.values()), NO_FILES),
    )


def _write_mixture(prepared: Sequence[PreparedSource]) -> str:
    entries = []
    for source in prepared:
        entry: dict[str, Any] = {"path": str(source.folder), "split": source.train_split}
        entries.append(entry if source.spec.weight is None else entry | {"weight": source.spec.weight})
    text: str = yaml.safe_dump(entries, default_flow_style=True, sort_keys=False, width=10**6)
    return text.strip()
