"""Keys of `contrastive`: an encoder becomes an embedding model."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSource:
    """One set of `contrastive.sets` or `contrastive.eval_sets`."""

    name: str | None = None
    """A known set (its key, hub name or the last part of that), any dataset of the hub, or a local file or folder."""

    config: str | None = None
    """Configuration of the hub dataset."""

    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""

    split: str | None = None
    """Split to read; null is `train`, or everything where there are no splits."""

    anchor_column: str | None = None
    """Column of the first text of a pair; null takes the first of the usual names that is there."""

    positive_column: str | None = None
    """Column of the text that belongs to it."""

    negative_columns: str | tuple[str, ...] | None = None
    """Columns of texts that do not belong to it; a column may hold a list."""

    score_column: str | None = None
    """Column of a similarity score: the pairs are then ranked by it, and have no negatives."""

    label_column: str | None = None
    """Column of a class: texts of one class belong together, and there are no pairs."""

    anchor_prefix: str | None = None
    """Put before every anchor of this set; null is `contrastive.anchor_prefix`."""

    positive_prefix: str | None = None
    """Put before every positive and negative of this set; null is `contrastive.positive_prefix`."""

    max_pairs: int | None = None
    """Use only the first pairs of the set, this many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveSection:
    """Contrastive fine-tuning (`task: contrastive`). A row is a pair: the rows of a step are each other's negatives."""

    sets: tuple[PairSource, ...] = ()
    """What to train on: a list of mappings with `name`, and optionally `split`, `config`, `revision`, `max_pairs`,
    columns (`anchor_column`, `positive_column`, `negative_columns`, `score_column`, `label_column`) and prefixes
    (`anchor_prefix`, `positive_prefix`). Replaces `dataset.name`."""

    eval_sets: tuple[PairSource, ...] = ()
    """What to evaluate on, written the same way: scored pairs by Spearman's correlation, other pairs by retrieval
    (nDCG@10 and MRR). `dataset.eval_samples` holds out pairs of every training set besides."""

    loss_type: Literal["auto", "infonce", "simcse", "supcon", "cosent"] = "auto"
    """auto follows each set: `infonce` for pairs, `cosent` for scored pairs, `supcon` for texts with labels. `simcse`
    pairs every anchor with itself under another dropout mask and takes sets of all kinds."""

    temperature: float = 0.05
    """Cosine similarities are divided by this."""

    learn_temperature: bool = False
    """true: the temperature is a weight that starts at `temperature` and never falls below 0.01."""

    num_hard_negatives: int = 1
    """Negatives of its own that an anchor brings along, where its set has any; 0 uses none."""

    hard_negative_weight: float = 0.0
    """Added to the logit of an anchor's own hard negatives; 0 treats them like all others."""

    both_directions: bool = False
    """true: `infonce` also looks for the anchor of every positive; the loss is the mean of both."""

    false_negative_margin: float | None = None
    """Leave out negatives whose similarity to the anchor is more than this above that of its positive; null keeps all.
    Negatives with the very text of the anchor or its positive are always left out."""

    matryoshka_dims: tuple[int, ...] = ()
    """Shorter widths at which the embeddings must work too: the loss is the mean over them and the full width."""

    pooling: Literal["mean", "cls", "max"] = "mean"
    """How the tokens of a text become one vector; `avg` is read as mean."""

    anchor_prefix: str | None = None
    """Put before every anchor (an instruction, or `query: `); the export keeps it as the prompt `query`."""

    positive_prefix: str | None = None
    """Put before every positive and negative; the export keeps it as the prompt `document`."""

    pretraining_prob: float = 0.0
    """Share of the steps that train on texts of `pretraining_dataset` instead of pairs."""

    pretraining_dataset: str | None = None
    """Texts for `pretraining_prob`: a dataset of the hub, or a local file or folder. Needs `preprocess.py` too."""

    pretraining_objective: Literal["simcse", "mlm"] = "simcse"
    """What these steps do: `simcse`, or masked language modelling as in pretraining."""

    pretrained_checkpoint_dir: str | None = None
    """The encoder to start from: a run folder, its `checkpoints`, an exported folder or a name of the hub. Its
    architecture and tokenizer are used; a key of `model` that says otherwise is an error."""

    pretrained_checkpoint: str = "latest"
    """Which checkpoint of a run: a step, or `latest`."""

    allow_random_weights: bool = False
    """true: start without a checkpoint, from random weights of `model` and the tokenizer of `tokenizer`."""
