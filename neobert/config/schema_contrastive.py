"""Keys of `contrastive`: an encoder becomes an embedding model."""

from dataclasses import dataclass
from typing import Literal

from neobert.key import key


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSource:
    """One set of `contrastive.sets` or `contrastive.eval_sets`."""

    # On resume other sets are another source; other columns, prefixes and limits of the same ones are declared.
    name: str | None = key(None, path=True, resume="order", changes="source")
    """A known set (its key, hub name or the last part of that), any dataset of the hub, or a local file or folder."""

    config: str | None = key(None, resume="order", changes="source")
    """Configuration of the hub dataset."""

    revision: str | None = key(None, resume="order", changes="source")
    """Branch, tag or commit of the hub dataset."""

    split: str | None = key(None, resume="order", changes="source")
    """Split to read; null is `train`, or everything where there are no splits."""

    anchor_column: str | None = key(None, resume="order")
    """Column of the first text of a pair; null takes the first of the usual names that is there."""

    positive_column: str | None = key(None, resume="order")
    """Column of the text that belongs to it."""

    negative_columns: str | tuple[str, ...] | None = key(None, resume="order")
    """Columns of texts that do not belong to it; a column may hold a list."""

    score_column: str | None = key(None, resume="order")
    """Column of a similarity score: the pairs are then ranked by it, and have no negatives."""

    label_column: str | None = key(None, resume="order")
    """Column of a class: texts of one class belong together, and there are no pairs."""

    anchor_prefix: str | None = key(None, resume="order")
    """Put before every anchor of this set; null is `contrastive.anchor_prefix`."""

    positive_prefix: str | None = key(None, resume="order")
    """Put before every positive and negative of this set; null is `contrastive.positive_prefix`."""

    max_pairs: int | None = key(None, at_least=1, resume="order")
    """Use only the first pairs of the set, this many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveSection:
    """Contrastive fine-tuning (`task: contrastive`). A row is a pair: the rows of a step are each other's negatives."""

    sets: tuple[PairSource, ...] = key((), resume="order", changes="source")
    """What to train on: a list of mappings with `name`, and optionally `split`, `config`, `revision`, `max_pairs`,
    columns (`anchor_column`, `positive_column`, `negative_columns`, `score_column`, `label_column`) and prefixes
    (`anchor_prefix`, `positive_prefix`). Replaces `dataset.name`."""

    # Losses before and after could not be compared: declared.
    eval_sets: tuple[PairSource, ...] = key((), resume="declared", changes="evaluation")
    """What to evaluate on, written the same way: scored pairs by Spearman's correlation, other pairs by retrieval
    (nDCG@10 and MRR). `dataset.eval_samples` holds out pairs of every training set besides."""

    loss_type: Literal["auto", "infonce", "simcse", "supcon", "cosent", "distill"] = key(
        "auto", resume="declared", changes="batch"
    )
    """auto follows each set: `infonce` for pairs, `cosent` for scored pairs, `supcon` for texts with labels. `simcse`
    pairs every anchor with itself under another dropout mask and takes sets of all kinds. `distill` learns the vectors
    that `teacher` makes of anchors and positives, and takes sets of all kinds."""

    # A resume compares the model, not its path: the same one may be elsewhere.
    teacher: str | None = key(None, path=True, needs="contrastive.loss_type=distill", resume="declared")
    """The encoder to learn from: a run, a checkpoint, an exported folder, or an encoder of transformers or
    sentence-transformers with the student's tokenizer. It pools as it was trained to."""

    temperature: float = key(0.05, at_least=0.01, resume="declared")
    """Cosine similarities are divided by this."""

    # One weight more or less: fixed.
    learn_temperature: bool = key(False, resume="fixed")
    """true: the temperature is a weight that starts at `temperature` and never falls below 0.01."""

    num_hard_negatives: int = key(1, at_least=0, resume="declared", changes="batch")
    """Negatives of its own that an anchor brings along, where its set has any; 0 uses none."""

    hard_negative_weight: float = key(0.0, resume="declared")
    """Added to the logit of an anchor's own hard negatives; 0 treats them like all others."""

    both_directions: bool = key(False, resume="declared")
    """true: `infonce` also looks for the anchor of every positive; the loss is the mean of both."""

    false_negative_margin: float | None = key(None, at_least=0, because="null keeps all negatives", resume="declared")
    """Leave out negatives whose similarity to the anchor is more than this above that of its positive; null keeps all.
    Negatives with the very text of the anchor or its positive are always left out."""

    matryoshka_dims: tuple[int, ...] = key((), at_least=1, resume="declared")
    """Shorter widths at which the embeddings must work too: the loss is the mean over them and the full width."""

    pooling: Literal["mean", "cls", "max", "tokens"] = key("mean", resume="declared")
    """How the tokens of a text become one vector; `avg` is read as mean. `tokens` keeps the vectors of all of them, and
    texts are compared by MaxSim (late interaction, ColBERT)."""

    anchor_prefix: str | None = key(None, resume="declared", changes="batch")
    """Put before every anchor (an instruction, or `query: `); the export keeps it as the prompt `query`."""

    positive_prefix: str | None = key(None, resume="declared", changes="batch")
    """Put before every positive and negative; the export keeps it as the prompt `document`."""

    pretraining_prob: float = key(
        0.0, at_least=0, below=1, needs="contrastive.pretraining_dataset", resume="declared", changes="batch"
    )
    """Fraction of the steps that train on texts of `pretraining_dataset` instead of pairs."""

    pretraining_dataset: str | None = key(
        None, path=True, needs="contrastive.pretraining_prob", resume="order", changes="source"
    )
    """Texts for `pretraining_prob`: a dataset of the hub, or a local file or folder. Needs `preprocess.py` too."""

    pretraining_objective: Literal["simcse", "mlm"] = key(
        "simcse", needs="contrastive.pretraining_prob", resume="declared", changes="batch"
    )
    """What these steps do: `simcse`, or masked language modelling as in pretraining."""

    # Read by a fresh start only: free.
    pretrained_checkpoint_dir: str | None = key(None, path=True, resume="free")
    """The encoder to start from: a run folder, its `checkpoints`, an exported folder or a name of the hub. Its
    architecture and tokenizer are used; a key of `model` that says otherwise is an error."""

    pretrained_checkpoint: str = key("latest", needs="contrastive.pretrained_checkpoint_dir", resume="free")
    """Which checkpoint of a run: a step, or `latest`."""

    allow_random_weights: bool = key(False, resume="free")
    """true: start without a checkpoint, from random weights of `model` and the tokenizer of `tokenizer`."""
