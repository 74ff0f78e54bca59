"""What storing weights in 16 bits costs: the same encoder in fp32 and rounded, both computed in fp32."""

from dataclasses import dataclass

import torch

from neobert.export.compare import build_model, our_states, random_documents
from neobert.export.forms import ExportError
from neobert.weights.encoder_weights import EncoderWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """Differences on documents of random tokens."""

    max_error: float
    """Of a logit."""

    relative_error: float
    """Of the largest logit."""

    cosine: float
    """The smallest of a document, between the means of its hidden states."""

    same_best: float
    """Fraction of logit rows with the same best entry."""

    def describe(self, dtype: str) -> str:
        """A line for people."""
        return (
            f"{dtype} against fp32, random tokens: largest difference of a logit {self.max_error:.1e} "
            f"({self.relative_error:.0e} of the largest), mean vectors cosine {self.cosine:.6f} or more, "
            f"the same best answer {self.same_best:.1%}"
        )


def check_range(before: EncoderWeights, after: EncoderWeights, dtype: str) -> None:
    """Raises ExportError when a weight is too large for the dtype."""
    infinite = [
        name for name, x in after.tensors.items() if not x.isfinite().all() and before.tensors[name].isfinite().all()
    ]
    if infinite:
        raise ExportError(f"--dtype: {dtype} cannot hold the weights of {', '.join(infinite)}; write bf16 or fp32")


@torch.inference_mode()
def measure_rounding(before: EncoderWeights, after: EncoderWeights, num_tokens: int) -> Rounding:
    """How far `after`, with tokens below `num_tokens`, is from `before`."""
    documents = random_documents(before.config.max_position_embeddings, num_tokens)
    one, other = (our_states(build_model(weights), documents) for weights in (before, after))
    logits = torch.cat([x[-1] for x in one]), torch.cat([x[-1] for x in other])
    max_error = float((logits[0] - logits[1]).abs().max())
    pairs = [(a[-2].mean(0), b[-2].mean(0)) for a, b in zip(one, other)]
    return Rounding(
        max_error=max_error,
        relative_error=max_error / float(logits[0].abs().max()),
        cosine=min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs),
        same_best=float((logits[0].argmax(1) == logits[1].argmax(1)).double().mean()),
    )
