"""Verification: does an exported folder, loaded by transformers in a fresh process, do exactly what our model does?

One process of `probe.py` runs any number of folders (starting transformers takes longer than small models do) and
imports nothing of this package. Our side reads the same folder, or the checkpoint it was made from, through
`neobert.weights`, and computes every document packed beside others. So an agreement covers the file, the
conversion, the code that comes with the folder, padding against packing, and the tokenizer.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.export.compare import TOLERANCE, build_model, layer_errors, our_states, random_documents
from neobert.export.forms import NATIVE, ExportError
from neobert.export.heads import choose_class, drop_projection, find_head
from neobert.export.onnx_file import ONNX_FILE
from neobert.export.opened import has_targets, open_files
from neobert.export.samples import SECONDS, TEXTS, sample_documents, wrap_texts
from neobert.export.target_rows import TargetRow, build_reference, describe_rows
from neobert.export.write import cut_vocabulary, pad, split_rows
from neobert.inference.fill_mask import MASK_TEXT, fill_mask
from neobert.model.pooling import choose_pooling
from neobert.objectives.base import ObjectiveModule, VectorSettings
from neobert.objectives.classification import HeadInfo, label_values
from neobert.objectives.late_interaction import TOKENS
from neobert.weights.encoder_weights import EncoderWeights, load_encoder_weights
from neobert.weights.vector_settings import load_vector_settings

FILL = f"the old {MASK_TEXT} stands by the river."
PROBABILITY_TOLERANCE = 1e-5
_HEADS = ("dense.", "classifier.")
_PROJECTION = ("lm_head.", "decoder.", "head.", "prediction_head.", "logit_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison."""

    name: str
    passed: bool
    detail: str
    max_error: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """All checks of one folder."""

    folder: str
    against: str
    checks: tuple[Check, ...]
    rows: tuple[TargetRow, ...] = ()
    """Of each file that was opened by the program it is for."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks) and all(row.passed for row in self.rows)

    def describe(self) -> str:
        """A line for each check."""
        marks = {True: "ok", False: "FAIL"}
        lines = [f"{marks[c.passed]:4}  {c.name}: {c.detail}" for c in self.checks]
        lines += [f"FAIL  {row.target}: {row.opened_by} gives other outputs" for row in self.rows if not row.passed]
        table = ["", describe_rows(self.rows)] if self.rows else []
        return "\n".join([f"{self.folder} against {self.against}", *lines, *table])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Subject:
    folder: Path
    against: str
    weights: EncoderWeights
    model: ObjectiveModule
    tokenizer: Tokenizer
    head: HeadInfo | None
    sentences: VectorSettings
    documents: list[list[int]]
    work: Path


def verify(folders: Sequence[tuple[Path, str | None]], *, kind: str = "model", table: bool = False) -> list[Verdict]:
    """Verifies exported folders, each against itself or against the checkpoint it was made from.

    Args:
        folders: Pairs of folder and source; None reads the folder itself.
        kind: Which weights of the sources are meant, a key of `neobert.weights.encoder_weights.WEIGHTS`.
        table: Measure every file of a folder, also where it has none beside those that transformers loads.

    Raises:
        WeightsError: a folder or source cannot be read by us.
        ExportError: transformers could not load or run a folder; the message ends with its error.
    """
    with tempfile.TemporaryDirectory() as temporary:
        subjects = [
            _prepare(Path(folder), against, Path(temporary) / str(number), kind)
            for number, (folder, against) in enumerate(folders)
        ]
        _run_probe(subjects, Path(temporary))
        return [_judge(subject, table=table) for subject in subjects]


def _prepare(folder: Path, against: str | None, work: Path, kind: str) -> _Subject:
    exported = load_encoder_weights(folder)
    if exported.layout not in (*NATIVE, "remote_code") or exported.tokenizer is None:
        raise ExportError(f"{folder} is no exported folder with a tokenizer; make one with neobert export")
    tokenizer = load_tokenizer(TokenizerSection(path=str(exported.tokenizer)))
    weights = exported
    if against is not None:
        source, _ = drop_projection(load_encoder_weights(against, weights=kind))
        source, _ = cut_vocabulary(source, exported.config.vocab_size)
        weights = _cast_like(exported, source)
    head = find_head(weights)
    work.mkdir()
    documents = random_documents(weights.config.max_position_embeddings, tokenizer.size)
    input_ids, mask = pad(documents, tokenizer.pad_id)
    save_file({"input_ids": input_ids, "attention_mask": mask}, work / "inputs.safetensors")
    return _Subject(
        folder=folder,
        against=against or "itself, read by us",
        weights=weights,
        model=build_model(weights),
        head=head,
        tokenizer=tokenizer,
        sentences=load_vector_settings(exported),
        documents=documents,
        work=work,
    )


def _cast_like(exported: EncoderWeights, source: EncoderWeights) -> EncoderWeights:
    """The weights of the source in the dtypes of the export."""
    dtypes = {name: x.dtype for name, x in (*exported.tensors.items(), *exported.training_only.items())}
    head = source.training_only if find_head(source) is not None else {}
    if set(dtypes) != {*source.tensors, *head}:
        raise ExportError(
            f"{exported.folder} and {source.folder} have different tensors; compare a folder with its own source"
        )
    return replace(
        source,
        tensors={name: x.to(dtypes[name]) for name, x in source.tensors.items()},
        training_only={name: x.to(dtypes[name]) for name, x in head.items()},
    )


def _run_probe(subjects: Sequence[_Subject], temporary: Path) -> None:
    trusts = [(s.folder / "config.json").read_text().find('"auto_map"') >= 0 for s in subjects]
    job = [
        {
            "folder": str(s.folder.resolve()),
            "trust": trust,
            # EuroBERT's class takes the first slot for [CLS], whatever is in it.
            "left": trust or s.head is None or s.head.pooling == "mean",
            "class": choose_class(s.head),
            "texts": TEXTS,
            "seconds": SECONDS if s.head is not None and s.head.num_texts == 2 else None,
            "fill": FILL.replace(MASK_TEXT, s.tokenizer.spell(s.tokenizer.mask_id)),
            "work": str(s.work),
            "onnx": not (s.folder / ONNX_FILE).is_file(),
        }
        for s, trust in zip(subjects, trusts)
    ]
    (temporary / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(temporary / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("probe.py")), str(temporary / "job.json")],
        env=environment,
        cwd=temporary,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ExportError("transformers could not run an exported folder:\n" + done.stderr.strip()[-2000:])


def _judge(subject: _Subject, *, table: bool) -> Verdict:
    tensors = load_file(subject.work / "outputs.safetensors")
    facts = json.loads((subject.work / "outputs.json").read_text())
    ours = our_states(subject.model, subject.documents)
    checks = [_check_loading(subject, facts)]
    checks += _check_layers(subject, ours, tensors)
    checks += _check_forms(subject, ours, tensors)
    checks += [_check_tokenizer(subject, facts), _check_inputs(facts)]
    checks += [_check_text(subject, name, tensors) for name in ("logits", "ONNX") if f"text.{name}" in tensors]
    if subject.head is None:
        checks += [_check_new_heads(tensors), _check_fill_mask(subject, facts)]
    else:
        checks += [_check_labels(subject.head, facts), _check_label_pipeline(subject, subject.head, facts)]
    if facts["sentences"] == "run":
        theirs = [tensors[f"sentences.{number}"] for number in range(len(wrap_texts(subject.tokenizer, 8)))]
        checks.append(_check_sentences(subject, theirs))
    for name, key in (("sentence-transformers", "sentences"), ("ONNX", "onnx")):
        if facts[key] != "run":
            checks.append(Check(name=name, passed=True, detail=f"skipped: {facts[key]}"))
    rows: list[TargetRow] = []
    if table or has_targets(subject.folder):
        rows = open_files(subject.folder, build_reference(subject.weights, subject.tokenizer, subject.sentences))
    return Verdict(folder=str(subject.folder), against=subject.against, checks=tuple(checks), rows=tuple(rows))


def _check_loading(subject: _Subject, facts: dict[str, Any]) -> Check:
    odd, new = [], (*_HEADS, *_PROJECTION)
    for name, kinds in facts["loading"].items():
        for kind, keys in kinds.items():
            # A base model has no head; a classifier starts with a new one.
            expected = {"base": new, "classifier": new, "tagger": new}.get(name, ())
            odd += [f"{name}: {kind} {key}" for key in keys if not key.startswith(expected)]
    return Check(
        name="loads with AutoModel, AutoModelForMaskedLM and both AutoModelFor...Classification"
        if subject.head is None
        else f"loads with AutoModel and AutoModelFor{choose_class(subject.head)}",
        passed=not odd,
        detail=", ".join(odd) or "no tensor missing, none unexpected",
    )


def _check_layers(subject: _Subject, ours: list[list[Tensor]], tensors: dict[str, Tensor]) -> list[Check]:
    count = sum(name.startswith("layer.") for name in tensors)
    layers = [tensors[f"layer.{number}"] for number in range(count)]
    logits = split_rows(tensors["logits.padded, int mask"], map(len, subject.documents))
    theirs = [[*(layer[row, : len(d)] for layer in layers), logits[row]] for row, d in enumerate(subject.documents)]
    checks = [
        Check(
            name=error.layer,
            passed=error.passed,
            detail=f"max error {error.max_error:.1e}, relative {error.relative_error:.1e}",
            max_error=error.max_error,
            relative_error=error.relative_error,
        )
        for error in layer_errors(ours, theirs)
    ]
    base = [tensors["base"][row, : len(d)] for row, d in enumerate(subject.documents)]
    return [*checks, _compare("AutoModel's last hidden state", [x[-2] for x in ours], base)]


def _check_forms(subject: _Subject, ours: list[list[Tensor]], tensors: dict[str, Tensor]) -> list[Check]:
    checks = []
    lengths = [len(document) for document in subject.documents]
    borders = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for name in (n.removeprefix("logits.") for n in tensors if n.startswith("logits.")):
        logits = tensors[f"logits.{name}"]
        if logits.ndim == 2:
            theirs = list(logits.split(1))
        elif name == "packed":
            theirs = [logits[0, start:end] for start, end in pairwise(borders)]
        elif name == "padded on the left":
            theirs = [logits[row, -n:] for row, n in enumerate(lengths)]
        else:
            theirs = [logits[row, :n] for row, n in enumerate(lengths[: len(logits)])]
        checks.append(_compare(f"logits, {name}", [x[-1] for x in ours[: len(theirs)]], theirs))
    return checks


def _compare(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Check:
    error = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    relative = error / max(float(a.abs().max()) for a in ours)
    return Check(
        name=name,
        passed=error <= TOLERANCE or relative <= TOLERANCE,
        detail=f"max error {error:.1e}, relative {relative:.1e}",
        max_error=error,
        relative_error=relative,
    )


def _check_new_heads(tensors: dict[str, Tensor]) -> Check:
    single = [tensors["classifier.single"][0], *tensors["tagger.single"][0]]
    padded = [tensors["classifier.padded"][-1], *tensors["tagger.padded"][-1]]
    return _compare("classifiers of texts and of tokens do not see padding", single, padded[: len(single)])


def _check_tokenizer(subject: _Subject, facts: dict[str, Any]) -> Check:
    tokenizer, problems = subject.tokenizer, []
    for text, ids, decoded in zip(TEXTS, facts["encoded"], facts["decoded"]):
        plain = tokenizer.encode_batch([text])[0].tolist()
        if ids != [tokenizer.cls_id, *plain, tokenizer.sep_id]:
            problems.append(f"{text!r} becomes {ids[:12]}...")
        if decoded.strip() != tokenizer.decode(plain).strip():
            problems.append(f"{text!r} comes back as {decoded!r}")
    longest = subject.weights.config.max_position_embeddings if subject.head is None else subject.head.max_length
    if facts["max_length"] != longest:
        problems.append(f"model_max_length is {facts['max_length']}")
    return Check(
        name="tokenizer",
        passed=not problems,
        detail="; ".join(problems) or f"{len(TEXTS)} texts to tokens as in training, and back",
    )


def _check_inputs(facts: dict[str, Any]) -> Check:
    return Check(
        name="inputs of the tokenizer",
        passed=not facts["not_accepted"],
        detail=f"the model does not take {', '.join(facts['not_accepted'])}; remove it from model_input_names of "
        "tokenizer_config.json"
        if facts["not_accepted"]
        else "the model takes all of them",
    )


def _check_text(subject: _Subject, name: str, tensors: dict[str, Tensor]) -> Check:
    """Texts through the folder's own tokenizer and `model(**inputs)`, against ours through ours."""
    ours = our_states(subject.model, _documents_of_texts(subject))
    lengths = [len(states[-2]) for states in ours]
    title = "from text" if name == "logits" else f"from text, {name}"
    if tensors["text.mask"].sum(1).tolist() != lengths:
        return Check(name=title, passed=False, detail="other numbers of tokens than in training")
    theirs = split_rows(tensors[f"text.{name}"], lengths)
    return _compare(title, [states[-1] for states in ours], theirs)


def _documents_of_texts(subject: _Subject) -> list[list[int]]:
    return sample_documents(subject.tokenizer, subject.head, subject.weights.config.max_position_embeddings)


def _check_fill_mask(subject: _Subject, facts: dict[str, Any]) -> Check:
    (filled,) = fill_mask(subject.model, subject.tokenizer, [FILL], top_k=len(facts["answers"]))
    ours = sorted((guess.token_id, guess.probability) for guess in filled.masks[0])
    theirs = sorted((int(token), float(score)) for token, score in facts["answers"])
    largest = max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True))
    same = [token for token, _ in ours] == [token for token, _ in theirs]
    return Check(
        name="fill-mask pipeline",
        passed=same and largest <= PROBABILITY_TOLERANCE,
        detail=f"{'the same' if same else 'other'} tokens, probabilities differ by at most {largest:.1e}",
        max_error=largest,
    )


def _check_labels(head: HeadInfo, facts: dict[str, Any]) -> Check:
    theirs = [facts["id2label"].get(str(number)) for number in range(len(facts["id2label"]))]
    ours = list(head.labels) or theirs[:1]
    return Check(
        name="labels",
        passed=theirs == ours,
        detail=", ".join(ours[:10]) if theirs == ours else f"id2label has {theirs[:10]}, training had {ours[:10]}",
    )


def _check_label_pipeline(subject: _Subject, head: HeadInfo, facts: dict[str, Any]) -> Check:
    """What the pipeline of transformers answers for TEXTS, against probabilities by our model and tokenizer."""
    logits = [
        states[-1]
        for states in our_states(
            subject.model,
            _documents_of_texts(subject),
        )
    ]
    largest, same = 0.0, True
    for own, answer in zip(logits, facts["answers"], strict=True):
        if head.kind == "tokens":
            probabilities, numbers = own.softmax(1).max(1)
            pairs = [(float(probabilities[i]), score) for i, _, score in answer]
            same &= [head.labels[int(numbers[i])] for i, _, _ in answer] == [label for _, label, _ in answer]
            same &= len(answer) == len(own) - 2
        else:
            values = label_values(head.kind, own[0])
            names = head.labels or tuple(answer)
            pairs = [(value, answer.get(name, float("inf"))) for name, value in zip(names, values.tolist())]
        largest = max([largest, *(abs(a - b) for a, b in pairs)])
    return Check(
        name=f"{'token' if head.kind == 'tokens' else 'text'}-classification pipeline",
        passed=same and largest <= PROBABILITY_TOLERANCE * (1 if head.labels else 10),
        detail=f"{'the same' if same else 'other'} labels, values differ by at most {largest:.1e}",
        max_error=largest,
    )


def _check_sentences(subject: _Subject, theirs: list[Tensor]) -> Check:
    settings = subject.sentences
    documents = wrap_texts(subject.tokenizer, settings.max_length)
    hidden = [states[-2] for states in our_states(subject.model, documents)]
    if settings.pooling == TOKENS:
        ours = [torch.nn.functional.normalize(states, dim=1) for states in hidden]
    else:
        pool = choose_pooling(settings.pooling)
        ours = [pool(states, torch.tensor([len(states)]))[0] for states in hidden]
    return _compare(f"sentence-transformers, {settings.pooling} pooling", ours, theirs)
