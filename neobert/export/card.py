"""README.md of an exported folder: what the model is, how it was trained, how to load it. Facts of the run only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.config.schema_data import DatacollatorSection
from neobert.data.tokenizer import Tokenizer
from neobert.export.card_data import OlderCard, build_card_data, read_older_card
from neobert.export.choose import Form
from neobert.export.facts import RunFacts, is_step, load_lineage, name_sources, readable
from neobert.export.sentence_files import SentenceSettings
from neobert.model.config import ModelConfig
from neobert.weights.folder import AVERAGE_FILE
from neobert.weights.load import EncoderWeights

_LICENSE = "# license: yours to choose; add the line before publishing\n"

_FILL_MASK = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForMaskedLM.from_pretrained("{name}"{trust}).eval()
inputs = tokenizer("some text with a {mask} in it", return_tensors="pt")
logits = model(**inputs).logits
```

Embeddings, the mean over the tokens of a text (the model was not trained for similarity; fine-tune it for that):

"""

_EMBED = """```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{name}"{trust}).encode(["a text", "another text"])
```"""


def model_card(
    weights: EncoderWeights,
    config: ModelConfig,
    tokenizer: Tokenizer,
    sentences: SentenceSettings,
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
    task = lineage[0].config.task if lineage else older.task
    data = build_card_data(task, lineage, older, form=form, name=name, source=source, language=language)
    training = older.training or _training(weights, lineage)
    sections = [
        f"---\n{data.to_yaml()}\n{'' if data.license else _LICENSE}---",
        f"# {name.split('/')[-1]}",
        _summary(task, config, form, dtype),
        *([f"## Training\n\n{training}"] if training else []),
        "## Use\n\n" + _use(task, tokenizer, sentences, name=name, form=form),
    ]
    return "\n\n".join(sections) + "\n"


def _use(task: str, tokenizer: Tokenizer, sentences: SentenceSettings, *, name: str, form: Form) -> str:
    mask = next(word for word, number in tokenizer.special_tokens.items() if number == tokenizer.mask_id)
    before = "Compare the vectors of texts by their cosine:\n\n" if task == "contrastive" else _FILL_MASK
    trust = "" if form == "native" else ", trust_remote_code=True"
    prompts = [
        f'\n- `encode(texts, prompt_name="{word}")` puts `{text}` before each text, as in training'
        for word, text in sentences.prompts
    ]
    return "".join(
        [(before + _EMBED).format(name=name, trust=trust, mask=mask), *(["\n"] if prompts else []), *prompts]
    )


_WHAT = {
    "pretraining": "An encoder trained with masked language modelling.",
    "contrastive": "An encoder fine-tuned to give texts of like meaning vectors with a large cosine.",
}


def _summary(task: str, config: ModelConfig, form: Form, dtype: str) -> str:
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
    return f"{_WHAT[task]} {loads}\n\n| | |\n|---|---|\n{table}"


def _norms(config: ModelConfig) -> str:
    if config.ngpt:
        return "none: hidden states and the vectors of all matrices have length 1 (nGPT, arXiv 2410.01131)"
    places = ["before each half of a block"]
    places += ["after the embedding"] if config.embedding_norm else []
    places += ["RMSNorm of queries and keys"] if config.qk_norm else []
    return ", ".join(["RMSNorm" if config.rms_norm else "LayerNorm", *places])


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
    lines += [line for facts in lineage[:1] for line in (*_figures(facts), *_versions(facts))]
    for base in lineage[1:]:
        lines += ["", "What it started from:", "", *_recipe(base), f"- optimizer steps: {base.step:,}", *_figures(base)]
    return "\n".join(lines)


def _recipe(facts: RunFacts) -> list[str]:
    config, start, rows = facts.config, facts.start, facts.state.get("rows_per_step")
    return [
        *([f"- started from {_place(start)}"] if start is not None else []),
        *(_contrastive_recipe(facts) if config.task == "contrastive" else _masking_recipe(facts)),
        f"- {config.optimizer.name}, peak learning rate {config.optimizer.lr:g}, {config.scheduler.name} schedule",
        f"- weight decay {config.optimizer.weight_decay:g}, seed {config.seed}"
        + (f", {rows:,} rows a step" if rows is not None else ""),
    ]


def _masking_recipe(facts: RunFacts) -> list[str]:
    data, masks = facts.config.dataset, facts.config.datacollator
    return [
        f"- data: {', '.join(name_sources(facts))}",
        f"- rows of {data.max_seq_length} tokens, {'packed' if masks.pack_sequences else 'one document each'}",
        f"- {_rate(masks)} of the tokens predicted{_UNITS[masks.mask_units]}, {_mix(masks)}",
    ]


_UNITS = {"tokens": "", "words": " by whole words", "spans": " by spans of words"}


def _rate(masks: DatacollatorSection) -> str:
    first, last = masks.mlm_probability, masks.mlm_probability_final
    return f"{first:.0%}" if last is None else f"{first:.0%} to {last:.0%}"


def _mix(masks: DatacollatorSection) -> str:
    if masks.mask_all:
        return "all of them as masks"
    masked, drawn = masks.mask_fraction, masks.random_fraction
    return f"{masked:.0%} as masks, {drawn:.0%} as random tokens, {max(0.0, 1 - masked - drawn):.0%} unchanged"


def _contrastive_recipe(facts: RunFacts) -> list[str]:
    section = facts.config.contrastive
    sets = ", ".join(name_sources(facts)) or f"all sets prepared in {readable(str(facts.config.dataset.path))}"
    return [
        f"- fine-tuned on pairs of {sets}",
        f"- texts of at most {facts.config.dataset.max_seq_length} tokens, {section.pooling} pooling",
        f"- loss: {_LOSSES[section.loss_type]}{_loss_options(facts.config)}",
        f"- temperature {section.temperature:g}{' at the start, then learned' if section.learn_temperature else ''}",
    ]


_LOSSES = {
    "auto": "InfoNCE for pairs, CoSENT for scored pairs, SupCon for texts with labels",
    "infonce": "InfoNCE",
    "simcse": "SimCSE (every text against itself under another dropout mask)",
    "supcon": "SupCon",
    "cosent": "CoSENT",
}


def _loss_options(config: Config) -> str:
    section = config.contrastive
    options = [f"up to {section.num_hard_negatives} hard negatives a pair"] if section.num_hard_negatives else []
    options += ["in both directions"] if section.both_directions else []
    options += [f"at widths {', '.join(map(str, section.matryoshka_dims))} too"] if section.matryoshka_dims else []
    if section.pretraining_prob:
        texts, share = readable(str(section.pretraining_dataset)), section.pretraining_prob
        options.append(f"{section.pretraining_objective} on texts of {texts} in {share:.0%} of the steps")
    return "".join(f"; {option}" for option in options)


def _place(source: str) -> str:
    """The run and step, folder or name of the hub that weights were taken from."""
    folder = Path(source)
    return f"the run {folder.parents[1].name}, step {int(folder.name):,}" if is_step(folder) else readable(source)


def _figures(facts: RunFacts) -> list[str]:
    tokens = sum(r["num_tokens"] for r in facts.records if r["kind"] == "step")
    lines = [f"- tokens seen: {tokens:,}"] if tokens else []
    last = facts.evaluation
    if last is None:
        return lines
    if "sets" in last:
        for key, metrics in last["sets"].items():
            values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            lines.append(f"- {key} at step {last['step']:,}: {values}")
    elif last["loss"] is not None:
        lines.append(
            f"- held-out loss at step {last['step']:,}: {last['loss']:.4f} nats per masked token, "
            f"{last['accuracy']:.1%} predicted exactly ({last['num_targets']:,} masked tokens)"
        )
    return lines


def _versions(facts: RunFacts) -> list[str]:
    versions: dict[str, Any] = facts.state.get("versions", {})
    return [f"- versions: {', '.join(f'{name} {number}' for name, number in versions.items())}"] if versions else []
