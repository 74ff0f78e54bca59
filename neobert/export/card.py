"""README.md of an exported folder: what the model is, how it was trained, how to load it; its front matter is what the
hub reads. Only what the run recorded or the call says.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from neobert.config.nesting import load_plain_yaml, parse_json
from neobert.data.source.known_sets import KNOWN_SETS
from neobert.data.tokenizer import Tokenizer
from neobert.export.facts import RunFacts, datasets_on_hub, hub_model, is_step, load_lineage, model_on_hub, name_sources
from neobert.export.forms import ExportError, Form, choose_family
from neobert.export.heads import find_head
from neobert.model.config import ModelConfig
from neobert.objectives.base import Objective, VectorSettings
from neobert.objectives.late_interaction import TOKENS
from neobert.objectives.mlm import MLM
from neobert.objectives.table import OBJECTIVES, choose_objective
from neobert.secrets import readable
from neobert.train.checkpoint.proof.digest_chain import PROOF_FILE
from neobert.weights.encoder_weights import EncoderWeights
from neobert.weights.folder import AVERAGE_FILE

_LICENSE = "# license: yours to choose; add the line before publishing\n"

_FILL_MASK = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForMaskedLM.from_pretrained("{name}"{trust}).eval()
inputs = tokenizer("some text with a {mask} in it", return_tensors="pt")
logits = model(**inputs).logits
```

"""

_LABEL = """```python
from transformers import pipeline

answer = pipeline("{tag}", model="{name}"{trust})
print(answer({example}))
```"""

_PLAIN_VECTORS = """\
Embeddings, the mean over the tokens of a text (the model was not trained for similarity; fine-tune it for that):

"""

_TRAINED_VECTORS = "Compare the vectors of texts by their cosine:\n\n"

_TOKEN_VECTORS = "A text is the vectors of all its tokens, which MaxSim compares (late interaction):\n\n"

_EMBED_TOKENS = """```python
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("{name}"{trust})
queries, documents = model.encode_query(["a question"]), model.encode_document(["a text", "another text"])
scores = model.similarity(queries, documents)
```"""

_EMBED = """```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{name}"{trust}).encode(["a text", "another text"])
```"""


def model_card(
    weights: EncoderWeights,
    config: ModelConfig,
    tokenizer: Tokenizer,
    sentences: VectorSettings,
    *,
    form: Form,
    dtype: str,
    name: str,
    source: str,
    language: tuple[str, ...],
    proof: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md. `config` is that of the exported folder, `name` what users load it by, `source` what was
    exported, `language` codes to state, `proof` what `build_proof` says of the run.

    Raises:
        ExportError: the folder that is exported has a card that cannot be read.
    """
    lineage = load_lineage(weights.folder, weights.step, weights.kind)
    older = OlderCard(data={}, training="") if lineage else read_older_card(weights.folder)
    objective = choose_objective(lineage[0].config) if lineage else older.objective
    data = build_card_data(objective, lineage, older, form=form, name=name, source=source, language=language)
    training = older.training or _training(weights, lineage)
    if proof is not None:
        training += (
            f"\n\n`{PROOF_FILE}` has the digest chain of {proof['step']:,} steps, `{proof['chain'][:16]}`: "
            "`neobert prove RUN --export FOLDER` compares it with the run."
        )
    sections = [
        f"---\n{data.to_yaml()}\n{'' if data.license else _LICENSE}---",
        f"# {name.split('/')[-1]}",
        _summary(objective, config, form, dtype),
        *([f"## Training\n\n{training}"] if training else []),
        "## Use\n\n" + _use(weights, objective, tokenizer, sentences, name=name, form=form),
    ]
    return "\n\n".join(sections) + "\n"


def _use(
    weights: EncoderWeights,
    objective: Objective,
    tokenizer: Tokenizer,
    sentences: VectorSettings,
    *,
    name: str,
    form: Form,
) -> str:
    trust = "" if form == "native" else ", trust_remote_code=True"
    head = find_head(weights)
    if head is not None:
        example = '"a text"' if head.num_texts == 1 else '{"text": "a text", "text_pair": "another text"}'
        return _LABEL.format(tag=objective.card.pipeline_tag, name=name, trust=trust, example=example)
    mask = tokenizer.spell(tokenizer.mask_id)
    before = _TRAINED_VECTORS
    if objective.vectors is None:
        before = (_FILL_MASK if objective.fills_masks else "") + _PLAIN_VECTORS
    prompts = [
        f'\n- `encode(texts, prompt_name="{name}")` puts `{text}` before each text, as in training'
        for name, text in sentences.prompts
    ]
    embed = _EMBED
    if sentences.pooling == TOKENS:
        before, embed = _TOKEN_VECTORS, _EMBED_TOKENS
    return "".join([(before + embed).format(name=name, trust=trust, mask=mask), *(["\n"] if prompts else []), *prompts])


def _summary(objective: Objective, config: ModelConfig, form: Form, dtype: str) -> str:
    loads = (
        f"It loads with the classes of transformers alone (architecture {choose_family(config)[0].title})."
        if form == "native"
        else "It needs `trust_remote_code=True`: the folder carries the code of its architecture."
    )
    rows = {
        "layers x width x heads": f"{config.num_hidden_layers} x {config.hidden_size} x {config.num_attention_heads}",
        "feed-forward": f"{config.hidden_act}, width {config.ffn_size}",
        "norm": _norms(config),
        "positions": _positions(config),
        "longest text": f"{config.max_position_embeddings} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens, "
        + ("tied to the embedding" if config.tie_word_embeddings else "with a projection of its own")
        + (", after a layer of its own" if config.prediction_head else "")
        + (", with a bias" if config.decoder_bias else ""),
        "weights": dtype,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"{objective.card.summary} {loads}\n\n| | |\n|---|---|\n{table}"


def _positions(config: ModelConfig) -> str:
    if not config.rope:
        return "learned"
    local = config.local_rope_theta
    return f"rotary, theta {config.rope_theta:g}" + ("" if local is None else f", {local:g} in layers with a window")


def _norms(config: ModelConfig) -> str:
    if config.ngpt:
        return "none: hidden states and the vectors of all matrices have length 1 (nGPT, arXiv 2410.01131)"
    norms = ["before each half of a block" + ("" if config.first_attention_norm else " but the first")]
    norms += ["after the embedding"] if config.embedding_norm else []
    norms += ["RMSNorm of queries and keys"] if config.qk_norm else []
    return ", ".join(["RMSNorm" if config.rms_norm else "LayerNorm", *norms])


def _training(weights: EncoderWeights, lineage: Sequence[RunFacts]) -> str:
    """Sentences about the run, then about those that it started from; empty where nothing is known."""
    lines = [line for facts in lineage[:1] for line in _recipe(facts)]
    if weights.step is not None:
        lines.append(f"- optimizer steps: {weights.step:,}")
    if weights.kind == "ema":
        lines.append("- weights: their exponential moving average over the training")
    if (weights.folder / AVERAGE_FILE).is_file():
        steps = parse_json((weights.folder / AVERAGE_FILE).read_text())["steps"]
        lines.append(f"- weights: the mean of the checkpoints of steps {', '.join(f'{step:,}' for step in steps)}")
    lines += [line for facts in lineage[:1] for line in (*_results(facts), *_versions(facts))]
    for base in lineage[1:]:
        lines += ["", "What it started from:", "", *_recipe(base), f"- optimizer steps: {base.step:,}", *_results(base)]
    return "\n".join(lines)


def _recipe(facts: RunFacts) -> list[str]:
    config, start, rows = facts.config, facts.start, facts.state.get("rows_per_step")
    return [
        *([f"- started from {_describe_source(start)}"] if start is not None else []),
        *choose_objective(config).card.recipe(config, name_sources(facts)),
        f"- {config.optimizer.name}, peak learning rate {config.optimizer.lr:g}, {config.scheduler.name} schedule",
        f"- weight decay {config.optimizer.weight_decay:g}, seed {config.seed}"
        + (f", {rows:,} rows a step" if rows is not None else ""),
    ]


def _describe_source(source: str) -> str:
    """The run and step, folder or name of the hub that weights were read from."""
    folder = Path(source)
    return f"the run {folder.parents[1].name}, step {int(folder.name):,}" if is_step(folder) else readable(source)


def _results(facts: RunFacts) -> list[str]:
    tokens = sum(r["num_tokens"] for r in facts.records if r["kind"] == "step")
    lines = [f"- tokens seen: {tokens:,}"] if tokens else []
    if facts.evaluation is not None:
        lines += choose_objective(facts.config).card.evaluation(facts.evaluation)
    return lines


def _versions(facts: RunFacts) -> list[str]:
    versions: dict[str, Any] = facts.state.get("versions", {})
    return [f"- versions: {', '.join(f'{name} {number}' for name, number in versions.items())}"] if versions else []


_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?$", re.S | re.M)
_TRAINING = re.compile(r"^## Training\n\n(.*?)(?=^## |\Z)", re.S | re.M)
_KEPT = ("language", "license", "license_name", "license_link", "datasets", "base_model", "model-index")


@dataclass(frozen=True, kw_only=True, slots=True)
class OlderCard:
    """What the README.md of an exported folder says, for an export of that folder."""

    data: dict[str, Any]
    training: str
    """The section about the training."""

    @property
    def objective(self) -> Objective:
        """What the model was trained for, by how the hub files it."""
        tag = self.data.get("pipeline_tag")
        return next((x for x in OBJECTIVES.values() if x.card.pipeline_tag == tag), MLM)


def check_language(codes: tuple[str, ...]) -> list[str]:
    """A sentence for each code that the hub would not take."""
    return [
        f"--language: {code!r} is no language code; write two or three letters (en, or en,de), code or multilingual"
        for code in codes
        if _LANGUAGE.fullmatch(code) is None
    ]


def read_older_card(folder: Path) -> OlderCard:
    """The card of an exported folder; an empty one where there is none.

    Raises:
        ExportError: its front matter is no YAML mapping.
    """
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    matter, training = _FRONT_MATTER.search(text), _TRAINING.search(text)
    try:
        data = load_plain_yaml(matter[1]) if matter is not None else {}
    except yaml.YAMLError as error:
        raise ExportError(f"{file}: its front matter is no YAML ({error}); correct it, or remove the file") from error
    if not isinstance(data, dict):
        raise ExportError(f"{file}: its front matter is no mapping; correct it, or remove the file")
    return OlderCard(data=data, training=training[1].strip() if training is not None else "")


def build_card_data(
    objective: Objective,
    lineage: Sequence[RunFacts],
    older: OlderCard,
    *,
    form: Form,
    name: str,
    source: str,
    language: tuple[str, ...],
) -> ModelCardData:
    """The front matter of a model with this objective.

    Args:
        lineage: The run, then what it started from; empty for a model that comes without a run, which keeps what its
            `older` card says.
        older: The card of the folder that is exported.
        form: Of the export.
        name: What users load the model by.
        source: What is exported: a folder, or a model of the hub.
        language: Codes that were passed in the call; none keeps those of `older`.
    """
    card = objective.card
    values: dict[str, Any] = {"base_model": hub_model(source)}
    values |= {key: older.data[key] for key in _KEPT if key in older.data}
    if lineage:
        results = list(_eval_results(lineage[0]))
        values["datasets"] = [data for facts in lineage for data in datasets_on_hub(facts)] or None
        values["base_model"] = next(filter(None, map(model_on_hub, lineage)), None)
        values |= {"eval_results": results, "model_name": name} if results else {}
    if language:
        values["language"] = list(language) if len(language) > 1 else language[0]
    data = ModelCardData(
        library_name=card.library_name,
        pipeline_tag=card.pipeline_tag,
        tags=[*card.tags, *(["custom_code"] if form == "remote_code" else [])],
        ignore_metadata_errors=True,
        **values,
    )
    data.model_name = name.split("/")[-1] if data.eval_results else None
    return data


def _eval_results(facts: RunFacts) -> Iterator[EvalResult]:
    """The evaluation of these very weights, as it was recorded; nothing when the last one is of an earlier step."""
    last = facts.evaluation
    if last is None or last["step"] != facts.step:
        return
    for task, dataset, metric, value, label in choose_objective(facts.config).card.results(last):
        named = {"dataset_type": KNOWN_SETS.get(dataset, dataset), "dataset_name": dataset} if dataset else None
        yield EvalResult(
            task_type=task,
            metric_type=metric,
            metric_value=value,
            metric_name=label or metric,
            **(named or _evaluated(facts)),  # type: ignore[arg-type]
        )


def _evaluated(facts: RunFacts) -> dict[str, str | None]:
    """The data of the evaluation: held-out documents of the training data, or a split of it."""
    data, sources = facts.config.dataset, ", ".join(name_sources(facts))
    one = data.path is None and not data.mixture
    return {
        "dataset_type": sources,
        "dataset_name": sources,
        "dataset_config": data.config if one else None,
        "dataset_split": data.eval_split,
        "dataset_revision": data.revision if one else None,
    }
