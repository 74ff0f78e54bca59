"""Export: a checkpoint -> a folder that transformers, sentence-transformers and the hub take as it is.

Everything that can be wrong is found and reported together before anything is written. Then the folder is made under a
temporary name, loaded with transformers, compared with our model on padded batches, and renamed.

The vocabulary is cut to the tokenizer's size. During training the embedding is padded to a multiple of 128 rows; those
rows are no tokens, and in an exported model nothing would keep one of them from having the largest logit. Without them
logits and probabilities are those of `scripts/predict.py`.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from safetensors.torch import save_file

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import Tokenizer, check_mask_token, load_tokenizer
from neobert.errors import DataError
from neobert.export.card import check_language, model_card
from neobert.export.compare import build_model, layer_errors, our_states, random_documents
from neobert.export.forms import (
    ExportError,
    Form,
    choose_form,
    code_files,
    native_config,
    native_tensors,
    remote_config,
    remote_tensors,
)
from neobert.export.heads import choose_class, describe_labels, drop_projection, find_head
from neobert.export.opened import open_files
from neobert.export.rounding import check_range, measure_rounding
from neobert.export.sentence_files import write_sentence_files
from neobert.export.target_rows import TargetRow, build_reference, describe_rows
from neobert.export.targets import TARGETS, ExportPlan, call_problems, plan_problems
from neobert.export.tokenizer_files import check_class, save_tokenizer
from neobert.objectives.table import OBJECTIVES
from neobert.terminal import progress_bar
from neobert.train.checkpoint.proof.digest_chain import PROOF_FILE, build_proof
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights, load_encoder_weights
from neobert.weights.folder import HEAD_FILE, MODEL_FILE, OBJECTIVE_KEY, STEPS_KEY, record_file
from neobert.weights.vector_settings import load_vector_settings
from neobert.weights.vocabulary import VOCABULARY_TENSORS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MODEL_CONFIG = "model_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """What to export, and as what."""

    source: str
    """Run folder, checkpoint, or anything else that `load_encoder_weights` takes."""

    output: Path
    form: str = "auto"
    dtype: str = "fp32"
    push_to_hub: str | None = None
    """`owner/name` of a repository of the hub to upload the folder to."""

    drop_decoder_bias: bool = False
    weights: str = "model"
    """`model`, or `ema` for their moving average."""

    targets: tuple[str, ...] = ("transformers",)
    """Keys of TARGETS. The folder that transformers loads is always made, and the files of others below it."""

    language: tuple[str, ...] = ()
    """Codes of the languages of the text it was trained on, for the model card; nothing is said without them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A folder that was written."""

    folder: Path
    form: Form
    step: int | None
    max_logit_error: float
    """Largest difference to our model's logits on random padded batches."""

    notes: tuple[str, ...]
    rows: tuple[TargetRow, ...]
    """Of each file that was made, where more than the folder of transformers was asked for."""


def export(request: ExportRequest) -> Exported:
    """Writes `request.output`, and uploads it if asked to.

    Raises:
        ExportError: something is wrong with the request, all of it in one message, and nothing was written; or the
            folder does not match our model, and it was removed again.
    """
    plan = _make_plan(request)
    temporary = request.output.with_name(f".tmp-{request.output.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(parents=True)
    except OSError as refused:
        raise ExportError(f"--output: {request.output} cannot be made ({refused.strerror})") from refused
    try:
        with progress_bar("export", 3) as show:
            changes = _write(plan, request, temporary)
            show(1)
            error = _check(plan, temporary)
            show(2)
            rows = _add_targets(plan, request.targets, temporary)
            show(3)
        _open_to_readers(temporary)
        temporary.rename(request.output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if request.push_to_hub is not None:
        _push(request.output, request.push_to_hub)
    return Exported(
        folder=request.output,
        form=plan.form,
        step=plan.weights.step,
        max_logit_error=error,
        notes=(*plan.notes, *changes),
        rows=rows,
    )


def _make_plan(request: ExportRequest) -> ExportPlan:
    problems: list[str] = []
    if request.output.exists():
        problems.append(f"--output: {request.output} exists already; choose another folder, or remove it")
    if request.dtype not in DTYPES:
        problems.append(f"--dtype: {request.dtype!r} is unknown; write {' or '.join(DTYPES)}")
    if request.push_to_hub is not None and len(request.push_to_hub.strip("/").split("/")) != 2:
        problems.append(f"--push-to-hub: {request.push_to_hub!r} is no repository; write owner/name")
    problems += [*check_language(request.language), *call_problems(request.targets)]
    weights, tokenizer, sentences, form, projection_note = None, None, None, None, None
    try:
        weights = load_encoder_weights(
            request.source, drop_decoder_bias=request.drop_decoder_bias, weights=request.weights
        )
        tokenizer = _load_tokenizer(weights)
        sentences = load_vector_settings(weights)
    except (WeightsError, DataError, ExportError) as error:
        problems.append(str(error))
    if weights is not None:
        try:
            if weights.config.hub_config is not None:
                kind = weights.config.hub_config["model_type"]
                raise ExportError(f"{request.source} has an encoder of transformers ({kind}), which is not exported")
            if (objective := OBJECTIVES[weights.objective]).is_causal:
                raise ExportError(
                    f"{request.source} was trained with {objective.title}, and tokens of the exported classes see both "
                    "sides: train it on with trainer.objective: mlm and model.init_from, and export that run"
                )
            weights, projection_note = drop_projection(weights)
            form = choose_form(weights.config, request.form)
        except ExportError as error:
            problems.append(str(error))
    if problems or weights is None or tokenizer is None or sentences is None or form is None:
        raise ExportError("\n".join(problems))
    assert weights.tokenizer is not None, "a tokenizer was loaded"
    cut, note = cut_vocabulary(weights, tokenizer.size)
    left_out = None
    if weights.training_only and find_head(weights) is None:
        left_out = f"of training only, so left out: {', '.join(weights.training_only)}"

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(DTYPES[request.dtype]).contiguous() for name, tensor in tensors.items()}

    stored = replace(cut, tensors=convert(cut.tensors), training_only=convert(cut.training_only))
    rounding = None
    if request.dtype != "fp32":
        check_range(cut, stored, request.dtype)
        rounding = measure_rounding(cut, stored, tokenizer.size).describe(request.dtype)
    plan = ExportPlan(
        weights=stored,
        tokenizer=tokenizer,
        tokenizer_folder=weights.tokenizer,
        sentences=sentences,
        form=form,
        notes=tuple(x for x in (note, projection_note, left_out, rounding) if x is not None),
    )
    problems = plan_problems(request.targets, plan)
    if problems:
        raise ExportError("\n".join(problems))
    return plan


def _load_tokenizer(weights: EncoderWeights) -> Tokenizer:
    if weights.tokenizer is None:
        raise ExportError(f"{weights.folder} has no tokenizer (tokenizer.json); put it into its folder tokenizer/")
    tokenizer = load_tokenizer(TokenizerSection(path=str(weights.tokenizer)))
    check_mask_token(tokenizer)
    if tokenizer.size > weights.config.vocab_size:
        raise ExportError(
            f"the tokenizer of {weights.folder} has {tokenizer.size} tokens, its embedding {weights.config.vocab_size} "
            "rows; put the tokenizer it was trained with beside it"
        )
    return tokenizer


def cut_vocabulary(weights: EncoderWeights, size: int) -> tuple[EncoderWeights, str | None]:
    """The weights with the first `size` rows of the vocabulary, and a sentence about what was left out."""
    if size == weights.config.vocab_size:
        return weights, None
    tensors = {name: x[:size] if name in VOCABULARY_TENSORS else x for name, x in weights.tensors.items()}
    note = f"{weights.config.vocab_size - size} rows of the vocabulary that are no tokens are left out"
    return replace(weights, config=replace(weights.config, vocab_size=size), tensors=tensors), note


def _write(plan: ExportPlan, request: ExportRequest, folder: Path) -> list[str]:
    config = plan.weights.config
    make_config = native_config if plan.form == "native" else remote_config
    dtype = str(DTYPES[request.dtype]).removeprefix("torch.")
    head = find_head(plan.weights)
    longest = config.max_position_embeddings if head is None else head.max_length
    changes = save_tokenizer(plan.tokenizer_folder, folder, max_length=longest)
    known: dict[str, object] = {} if plan.weights.step is None else {STEPS_KEY: plan.weights.step}
    objective = OBJECTIVES[plan.weights.objective]
    known |= {} if objective.fills_masks else {OBJECTIVE_KEY: objective.name}
    described = make_config(config, plan.tokenizer, dtype, fills_masks=objective.fills_masks)
    if head is not None:
        described |= describe_labels(head, plan.form)
        _write_json(folder / HEAD_FILE, asdict(head))
    _write_json(folder / "config.json", described | known)
    if plan.form == "native":
        _write_json(folder / _MODEL_CONFIG, config.to_dict())
    else:
        for name, source in code_files().items():
            (folder / name).write_text(source, encoding="utf-8")
    changes += check_class(folder)
    save_file(_stored_tensors(plan), folder / MODEL_FILE, metadata={"format": "pt"})
    proof = _write_proof(plan, request, folder)
    write_sentence_files(folder, config, plan.sentences)
    card = model_card(
        plan.weights,
        config,
        plan.tokenizer,
        plan.sentences,
        form=plan.form,
        dtype=dtype,
        name=request.push_to_hub or request.output.name,
        source=request.source,
        language=request.language,
        proof=proof,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return changes


def _stored_tensors(plan: ExportPlan) -> dict[str, torch.Tensor]:
    make_tensors = native_tensors if plan.form == "native" else remote_tensors
    head = {} if find_head(plan.weights) is None else plan.weights.training_only
    return make_tensors(plan.weights.config, plan.weights.tensors) | head


def convert_again(request: ExportRequest) -> dict[str, torch.Tensor]:
    """The tensors that an export would store; nothing is written.

    Raises:
        ExportError: something is wrong with the request.
    """
    return _stored_tensors(_make_plan(request))


def _write_proof(plan: ExportPlan, request: ExportRequest, folder: Path) -> dict[str, Any] | None:
    """Writes the digest chain of the run behind the weights; None where there is none."""
    proof = build_proof(plan.weights.folder, plan.weights.kind)
    if proof is not None:
        names = ("form", "dtype", "drop_decoder_bias", "weights")
        settings = {name: getattr(request, name) for name in names}
        proof["exported"] = {"sha256": record_file(folder / MODEL_FILE).sha256, "settings": settings}
        _write_json(folder / PROOF_FILE, proof)
    return proof


def _open_to_readers(folder: Path) -> None:
    """Modes 0644 and 0755: safetensors makes files that nobody else can read, and a server is often somebody else."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


@torch.inference_mode()
def _check(plan: ExportPlan, folder: Path) -> float:
    """Largest error of the logits. Raises ExportError when any layer disagrees."""
    ours = build_model(plan.weights)
    kind = choose_class(find_head(plan.weights))
    theirs = (
        getattr(transformers, f"AutoModelFor{kind}")
        .from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=plan.form == "remote_code")
        .eval()
    )
    documents = random_documents(plan.weights.config.max_position_embeddings, plan.tokenizer.size)
    input_ids, mask = pad(documents, plan.tokenizer.pad_id)
    output = theirs(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
    padded = [
        [*(layer[row, : len(document)] for layer in output.hidden_states), logits]
        for row, (document, logits) in enumerate(zip(documents, split_rows(output.logits, map(len, documents))))
    ]
    errors = layer_errors(our_states(ours, documents), padded)
    wrong = [f"{e.layer} differs by {e.max_error:.1e}" for e in errors if not e.passed]
    if wrong:
        raise ExportError("\n  ".join(["the exported model does not match ours, nothing is kept:", *wrong]))
    return errors[-1].max_error


def _add_targets(plan: ExportPlan, targets: Sequence[str], folder: Path) -> tuple[TargetRow, ...]:
    """Makes the files of targets, and opens everything. Raises ExportError when one does not match our model."""
    if tuple(targets) == ("transformers",):
        return ()
    for name in targets:
        TARGETS[name].write(plan, folder)
    rows = open_files(folder, build_reference(plan.weights, plan.tokenizer, plan.sentences))
    wrong = [row for row in rows if not row.passed]
    if wrong:
        raise ExportError(f"exported files do not match our model, nothing is kept:\n{describe_rows(wrong)}")
    return tuple(rows)


def split_rows(logits: torch.Tensor, lengths: Iterable[int]) -> list[torch.Tensor]:
    """What a padded batch says of each document: `[n, C]` of its tokens for `[B, S, C]`, else `[1, C]`."""
    if logits.ndim == 2:
        return list(logits.split(1))
    return [row[:length] for row, length in zip(logits, lengths)]


def pad(documents: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 `[B, S]`, padding on the right."""
    longest = max(map(len, documents))
    input_ids = torch.tensor([[*d, *[pad_id] * (longest - len(d))] for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in documents])
    return input_ids, mask


def _push(folder: Path, name: str) -> None:
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Upload the exported encoder")
    except Exception as error:  # The library raises many kinds; the folder is complete and stays.
        raise ExportError(
            f"--push-to-hub: {name} was not uploaded ({error}); {folder} is complete, check `hf auth login` and upload "
            f"it with `hf upload {name} {folder}`"
        ) from error
