"""Keys of `distill`: a student learns from the outputs of a trained encoder too."""

from dataclasses import dataclass

from neobert.key import key


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillSection:
    """Distillation (`trainer.objective: distill`): masked language modelling beside the outputs of a frozen teacher for
    the same masked rows."""

    # A resume compares the model, not its path: the same one may be elsewhere.
    teacher: str | None = key(None, path=True, resume="declared")
    """The model to learn from: a run, a checkpoint, an exported folder, or a model of the hub of any family that
    docs/export.md lists; with `logits_weight: 0` any encoder of transformers. It has the student's tokenizer, which is
    its own where none is named."""

    mlm_weight: float = key(1.0, at_least=0, resume="declared")
    """Weight of the cross entropy of the masked tokens."""

    logits_weight: float = key(1.0, at_least=0, resume="declared")
    """Weight of the divergence (KL) between the predictions of teacher and student for the masked tokens; 0 leaves it
    out."""

    hidden_weight: float = key(1.0, at_least=0, resume="declared")
    """Weight of 1 - cosine between the last hidden states of teacher and student, over all tokens; 0 leaves it out.
    Where their widths differ, a learned matrix is in between, which only training has."""

    temperature: float = key(2.0, above=0, needs="distill.logits_weight", resume="declared")
    """Both predictions are softened by it; the divergence is multiplied by its square, so that its gradient keeps its
    size."""
