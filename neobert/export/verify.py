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
from neobert.export.forms import ExportError
from neobert.export.write import cut_vocabulary, pad
from neobert.inference.fill_mask import MASK_TEXT, fill_mask
from neobert.model.pooling import choose_pooling
from neobert.objectives.base import ObjectiveModule, VectorSettings
from neobert.objectives.late_interaction import TOKENS
from neobert.weights.encoder_weights import EncoderWeights, load_encoder_weights
from neobert.weights.vector_settings import load_vector_settings

TEXTS = (
    "the old house stands by the river.",
    "A second, longer text: it has a number (1984), a dash - and a question?",
    "x",
    "Ünïcode: naïve CAFÉ, 東京 and 🙂;\ttabs\nlines  two spaces, don't, 3.14, <b>x_1</b>",
)
FILL = f"the old {MASK_TEXT} stands by the river."
PROBABILITY_TOLERANCE = 1e-5
_HEADS = ("dense.", "classifier.")
_PROJECTION = ("lm_head.", "decoder.", "logit_scale")


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

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def describe(self) -> str:
        """A line for each check."""
        marks = {True: "ok", False: "FAIL"}
        lines = [f"{marks[c.passed]:4}  {c.name}: {c.detail}" for c in self.checks]
        return "\n".join([f"{self.folder} against {self.against}", *lines])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Subject:
    folder: Path
    against: str
    weights: EncoderWeights
    model: ObjectiveModule
    tokenizer: Tokenizer
    sentences: VectorSettings
    documents: list[list[int]]
    work: Path


def verify(folders: Sequence[tuple[Path, str | None]], *, kind: str = "model") -> list[Verdict]:
    """Verifies exported folders, each against itself or against the checkpoint it was made from.

    Args:
        folders: Pairs of folder and source; None reads the folder itself.
        kind: Which weights of the sources are meant, a key of `neobert.weights.encoder_weights.WEIGHTS`.

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
        return [_judge(subject) for subject in subjects]


def _prepare(folder: Path, against: str | None, work: Path, kind: str) -> _Subject:
    exported = load_encoder_weights(folder)
    if exported.layout not in ("eurobert", "remote_code") or exported.tokenizer is None:
        raise ExportError(f"{folder} is no exported folder with a tokenizer; make one with neobert export")
    tokenizer = load_tokenizer(TokenizerSection(path=str(exported.tokenizer)))
    weights = exported
    if against is not None:
        source, _ = cut_vocabulary(load_encoder_weights(against, weights=kind), exported.config.vocab_size)
        dtypes = {name: tensor.dtype for name, tensor in exported.tensors.items()}
        if set(dtypes) != set(source.tensors):
            raise ExportError(f"{folder} and {against} have different tensors; compare a folder with its own source")
        weights = replace(source, tensors={name: t.to(dtypes[name]) for name, t in source.tensors.items()})
    work.mkdir()
    documents = random_documents(weights.config.max_position_embeddings, tokenizer.size)
    input_ids, mask = pad(documents, tokenizer.pad_id)
    save_file({"input_ids": input_ids, "attention_mask": mask}, work / "inputs.safetensors")
    return _Subject(
        folder=folder,
        against=against or "itself, read by us",
        weights=weights,
        model=build_model(weights),
        tokenizer=tokenizer,
        sentences=load_vector_settings(exported),
        documents=documents,
        work=work,
    )


def _run_probe(subjects: Sequence[_Subject], temporary: Path) -> None:
    job = [
        {
            "folder": str(s.folder.resolve()),
            "trust": (s.folder / "config.json").read_text().find('"auto_map"') >= 0,
            "texts": TEXTS,
            "fill": FILL.replace(MASK_TEXT, _mask_token(s.tokenizer)),
            "work": str(s.work),
        }
        for s in subjects
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


def _judge(subject: _Subject) -> Verdict:
    tensors = load_file(subject.work / "outputs.safetensors")
    facts = json.loads((subject.work / "outputs.json").read_text())
    ours = our_states(subject.model, subject.documents)
    checks = [_check_loading(facts)]
    checks += _check_layers(subject, ours, tensors)
    checks += _check_forms(subject, ours, tensors)
    checks += [_check_heads(tensors), _check_tokenizer(subject, facts), _check_inputs(facts)]
    checks += [_check_text(subject, name, tensors) for name in ("logits", "ONNX") if f"text.{name}" in tensors]
    checks.append(_check_fill_mask(subject, facts))
    if facts["sentences"] == "run":
        theirs = [tensors[f"sentences.{number}"] for number in range(len(_wrap_texts(subject.tokenizer, 8)))]
        checks.append(_check_sentences(subject, theirs))
    for name, key in (("sentence-transformers", "sentences"), ("ONNX", "onnx")):
        if facts[key] != "run":
            checks.append(Check(name=name, passed=True, detail=f"skipped: {facts[key]}"))
    return Verdict(folder=str(subject.folder), against=subject.against, checks=tuple(checks))


def _check_loading(facts: dict[str, Any]) -> Check:
    odd, new = [], (*_HEADS, *_PROJECTION)
    for name, kinds in facts["loading"].items():
        for kind, keys in kinds.items():
            # A base model has no head; a classifier starts with a new one.
            expected = {"base": _PROJECTION, "classifier": new, "tagger": new}.get(name, ())
            odd += [f"{name}: {kind} {key}" for key in keys if not key.startswith(expected)]
    return Check(
        name="loads with AutoModel, AutoModelForMaskedLM and both AutoModelFor...Classification",
        passed=not odd,
        detail=", ".join(odd) or "no tensor missing, none unexpected",
    )


def _check_layers(subject: _Subject, ours: list[list[Tensor]], tensors: dict[str, Tensor]) -> list[Check]:
    count = sum(name.startswith("layer.") for name in tensors)
    layers = [tensors[f"layer.{number}"] for number in range(count)] + [tensors["logits.padded, int mask"]]
    theirs = [[layer[row, : len(d)] for layer in layers] for row, d in enumerate(subject.documents)]
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
        if name == "packed":
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


def _check_heads(tensors: dict[str, Tensor]) -> Check:
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
    if facts["max_length"] != subject.weights.config.max_position_embeddings:
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
    ours = our_states(subject.model, _wrap_texts(subject.tokenizer, subject.weights.config.max_position_embeddings))
    lengths = [len(states[-1]) for states in ours]
    title = "from text" if name == "logits" else f"from text, {name}"
    if tensors["text.mask"].sum(1).tolist() != lengths:
        return Check(name=title, passed=False, detail="other numbers of tokens than in training")
    theirs = [logits[:n] for logits, n in zip(tensors[f"text.{name}"], lengths)]
    return _compare(title, [states[-1] for states in ours], theirs)


def _wrap_texts(tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
    """TEXTS as documents of training, cut at `max_length` tokens."""
    plain = [ids.tolist()[: max_length - 2] for ids in tokenizer.encode_batch(list(TEXTS))]
    return [[tokenizer.cls_id, *ids, tokenizer.sep_id] for ids in plain]


def _check_fill_mask(subject: _Subject, facts: dict[str, Any]) -> Check:
    (filled,) = fill_mask(subject.model, subject.tokenizer, [FILL], top_k=len(facts["guesses"]))
    ours = sorted((guess.token_id, guess.probability) for guess in filled.masks[0])
    theirs = sorted((int(token), float(score)) for token, score in facts["guesses"])
    largest = max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True))
    same = [token for token, _ in ours] == [token for token, _ in theirs]
    return Check(
        name="fill-mask pipeline",
        passed=same and largest <= PROBABILITY_TOLERANCE,
        detail=f"{'the same' if same else 'other'} tokens, probabilities differ by at most {largest:.1e}",
        max_error=largest,
    )


def _check_sentences(subject: _Subject, theirs: list[Tensor]) -> Check:
    settings = subject.sentences
    documents = _wrap_texts(subject.tokenizer, settings.max_length)
    hidden = [states[-2] for states in our_states(subject.model, documents)]
    if settings.pooling == TOKENS:
        ours = [torch.nn.functional.normalize(states, dim=1) for states in hidden]
    else:
        pool = choose_pooling(settings.pooling)
        ours = [pool(states, torch.tensor([len(states)]))[0] for states in hidden]
    return _compare(f"sentence-transformers, {settings.pooling} pooling", ours, theirs)


def _mask_token(tokenizer: Tokenizer) -> str:
    return next(token for token, number in tokenizer.special_tokens.items() if number == tokenizer.mask_id)
