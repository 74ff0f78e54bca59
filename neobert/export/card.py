"""README.md of an exported folder: what the model is, how it was trained, how to load it. Facts of the run only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.data.tokenizer import Tokenizer
from neobert.export.card_data import OlderCard, build_card_data, read_older_card
from neobert.export.choose import Form
from neobert.export.facts import RunFacts, is_step, load_lineage, name_sources
from neobert.model.config import ModelConfig
from neobert.objectives.base import Objective, VectorSettings
from neobert.objectives.table import choose_objective
from neobert.secrets import readable
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

_PLAIN_VECTORS = """\
Embeddings, the mean over the tokens of a text (the model was not trained for similarity; fine-tune it for that):

"""

_TRAINED_VECTORS = "Compare the vectors of texts by their cosine:\n\n"

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
) -> str:
    """The text of README.md. `config` is that of the exported folder, `name` what users load it by, `source` what was
    exported, `language` codes to state.

    Raises:
        ExportError: the folder that is exported has a card that cannot be read.
    """
    lineage = load_lineage(weights.folder, weights.step, weights.kind)
    older = OlderCard(data={}, training="") if lineage else read_older_card(weights.folder)
    objective = choose_objective(lineage[0].config) if lineage else older.objective
    data = build_card_data(objective, lineage, older, form=form, name=name, source=source, language=language)
    training = older.training or _training(weights, lineage)
    sections = [
        f"---\n{data.to_yaml()}\n{'' if data.license else _LICENSE}---",
        f"# {name.split('/')[-1]}",
        _summary(objective, config, form, dtype),
        *([f"## Training\n\n{training}"] if training else []),
        "## Use\n\n" + _use(objective, tokenizer, sentences, name=name, form=form),
    ]
    return "\n\n".join(sections) + "\n"


def _use(objective: Objective, tokenizer: Tokenizer, sentences: VectorSettings, *, name: str, form: Form) -> str:
    mask = next(token for token, number in tokenizer.special_tokens.items() if number == tokenizer.mask_id)
    before = _TRAINED_VECTORS
    if objective.vectors is None:
        before = (_FILL_MASK if objective.fills_masks else "") + _PLAIN_VECTORS
    trust = "" if form == "native" else ", trust_remote_code=True"
    prompts = [
        f'\n- `encode(texts, prompt_name="{name}")` puts `{text}` before each text, as in training'
        for name, text in sentences.prompts
    ]
    return "".join(
        [(before + _EMBED).format(name=name, trust=trust, mask=mask), *(["\n"] if prompts else []), *prompts]
    )


def _summary(objective: Objective, config: ModelConfig, form: Form, dtype: str) -> str:
    loads = (
        "It loads with the classes of transformers alone (architecture EuroBERT)."
        if form == "native"
        else "It needs `trust_remote_code=True`: the folder carries the code of its architecture."
    )
    rows = {
        "layers x width x heads": f"{config.num_hidden_layers} x {config.hidden_size} x {config.num_attention_heads}",
        "feed-forward": f"{config.hidden_act}, width {config.ffn_size}",
        "norm": _norms(config),
        "positions": f"rotary, theta {config.rope_theta:g}" if config.rope else "learned",
        "longest text": f"{config.max_position_embeddings} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens, "
        + ("tied to the embedding" if config.tie_word_embeddings else "with a projection of its own")
        + (", with a bias" if config.decoder_bias else ""),
        "weights": dtype,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"{objective.card.summary} {loads}\n\n| | |\n|---|---|\n{table}"


def _norms(config: ModelConfig) -> str:
    if config.ngpt:
        return "none: hidden states and the vectors of all matrices have length 1 (nGPT, arXiv 2410.01131)"
    norms = ["before each half of a block"]
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
