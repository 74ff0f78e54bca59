"""README.md of an exported folder: what the model is, how it was trained, how to load it. Facts of the run only."""

from typing import Any

from neobert.config.load import load_saved_config
from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.config.schema_data import DatacollatorSection
from neobert.data.tokenizer import Tokenizer
from neobert.export.choose import Form
from neobert.model.config import ModelConfig
from neobert.weights.folder import AVERAGE_FILE
from neobert.weights.load import EncoderWeights

_USAGE = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForMaskedLM.from_pretrained("{name}"{trust}).eval()
inputs = tokenizer("some text with a {mask} in it", return_tensors="pt")
logits = model(**inputs).logits
```

Embeddings{note}:

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{name}"{trust}).encode(["a text", "another text"])
```"""


def model_card(
    weights: EncoderWeights, config: ModelConfig, tokenizer: Tokenizer, *, form: Form, dtype: str, name: str
) -> str:
    """The text of README.md. `config` is that of the exported folder, `name` what users load it by."""
    sections = [_front_matter(), f"# {name.split('/')[-1]}", _summary(config, form, dtype)]
    training = _training(weights)
    if training:
        sections.append("## Training\n\n" + training)
    mask = next(word for word, number in tokenizer.special_tokens.items() if number == tokenizer.mask_id)
    note = ", the mean over the tokens of a text (the model was not trained for similarity; fine-tune it for that)"
    if _is_embedding_model(weights):
        note = " (compare them by their cosine)"
    trust = "" if form == "native" else ", trust_remote_code=True"
    sections.append("## Use\n\n" + _USAGE.format(name=name, trust=trust, mask=mask, note=note))
    return "\n\n".join(sections) + "\n"


def _is_embedding_model(weights: EncoderWeights) -> bool:
    file = weights.folder / "config.yaml"
    return weights.layout == "checkpoint" and file.is_file() and load_saved_config(file).task == "contrastive"


def _front_matter() -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- masked-lm\n- encoder\n"
        "# license: yours to choose; add the line before publishing\n---"
    )


def _summary(config: ModelConfig, form: Form, dtype: str) -> str:
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
    return f"An encoder trained with masked language modelling. {loads}\n\n| | |\n|---|---|\n{table}"


def _norms(config: ModelConfig) -> str:
    if config.ngpt:
        return "none: hidden states and the vectors of all matrices have length 1 (nGPT, arXiv 2410.01131)"
    places = ["before each half of a block"]
    places += ["after the embedding"] if config.embedding_norm else []
    places += ["RMSNorm of queries and keys"] if config.qk_norm else []
    return ", ".join(["RMSNorm" if config.rms_norm else "LayerNorm", *places])


def _training(weights: EncoderWeights) -> str:
    """Sentences about the run; empty for weights that came without one."""
    lines = []
    if weights.layout == "checkpoint" and (weights.folder / "config.yaml").is_file():
        lines += _recipe(load_saved_config(weights.folder / "config.yaml"))
    if weights.step is not None:
        lines.append(f"- optimizer steps: {weights.step:,}")
    if weights.kind == "ema":
        lines.append("- weights: their exponential moving average over the training")
    if (weights.folder / AVERAGE_FILE).is_file():
        steps = parse_json((weights.folder / AVERAGE_FILE).read_text())["steps"]
        lines.append(f"- weights: the mean of the checkpoints of steps {', '.join(f'{step:,}' for step in steps)}")
    lines += _figures(weights)
    return "\n".join(lines)


def _recipe(config: Config) -> list[str]:
    if config.task == "contrastive":
        return _contrastive_recipe(config)
    data, masks = config.dataset, config.datacollator
    named = [x.name or x.path for x in data.mixture] or [data.path or data.name]
    # A path of the machine it was trained on tells readers nothing but the name of the folder.
    sources = [str(x).rstrip("/").split("/")[-1] if str(x).startswith(("/", ".", "~")) else str(x) for x in named]
    return [
        f"- data: {', '.join(sources)}",
        f"- rows of {data.max_seq_length} tokens, {'packed' if masks.pack_sequences else 'one document each'}",
        f"- {_rate(masks)} of the tokens predicted{_UNITS[masks.mask_units]}, {_mix(masks)}",
        f"- {config.optimizer.name}, peak learning rate {config.optimizer.lr:g}, {config.scheduler.name} schedule",
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


def _contrastive_recipe(config: Config) -> list[str]:
    section, names = config.contrastive, config.dataset.name
    listed = [x.name for x in section.sets] or (
        [names] if isinstance(names, str) else list(names or ["all known sets"])
    )
    return [
        f"- fine-tuned on pairs of {', '.join(str(x).rstrip('/').split('/')[-1] for x in listed)}",
        f"- texts of at most {config.dataset.max_seq_length} tokens, {section.pooling} pooling",
        f"- loss {section.loss_type}, temperature {section.temperature:g}",
        f"- {config.optimizer.name}, peak learning rate {config.optimizer.lr:g}, {config.scheduler.name} schedule",
    ]


def _figures(weights: EncoderWeights) -> list[str]:
    log = weights.folder.parent.parent / "log.jsonl"
    if weights.folder.parent.name != "checkpoints" or not log.is_file() or weights.step is None:
        return []
    records = [r for r in map(_parse, log.read_text().splitlines()) if r.get("step", weights.step + 1) <= weights.step]
    tokens = sum(r["num_tokens"] for r in records if r["kind"] == "step")
    lines = [f"- tokens seen: {tokens:,}"] if tokens else []
    evaluations = [r for r in records if r["kind"] == _EVALUATIONS[weights.kind]]
    if evaluations and "sets" in evaluations[-1]:
        last = evaluations[-1]
        for key, figures in last["sets"].items():
            values = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            lines.append(f"- {key} at step {last['step']:,}: {values}")
    elif evaluations:
        last = evaluations[-1]
        lines.append(
            f"- held-out loss at step {last['step']:,}: {last['loss']:.4f} nats per masked token, "
            f"{last['accuracy']:.1%} predicted exactly ({last['num_targets']:,} masked tokens)"
        )
    return lines


_EVALUATIONS = {"model": "eval", "ema": "eval_ema"}
"""Kind of weights -> the lines of log.jsonl that are about them."""


def _parse(line: str) -> dict[str, Any]:
    try:
        return parse_json(line)
    except ValueError:  # The line that a run is writing just now.
        return {}
