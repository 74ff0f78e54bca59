"""The size dial: every size of one model from its depth, by laws (`neobert pretrain dial --depth 4`).

`dial.yaml` is a config like any other, of depth 4. `--depth` lays the values of another depth over it as overrides,
before those that are typed, so that the loader, its errors and `--print-config` are the usual ones and the saved config
holds plain values. A positional config with a parameter needs no more than that.

| value | law | source |
|---|---|---|
| width H | 64 d | nanochat's depth dial |
| heads | d, so 64 wide | BERT, arXiv 1810.04805 |
| feed-forward | 4 H, of which SwiGLU uses two thirds | Shazeer, arXiv 2002.05202 |
| parameters P | 12 d H^2 + V H, V = 30,592 | blocks of 4 + 8 matrices H x H and a tied vocabulary |
| tokens D | r P, r = 20 | Hoffmann et al., arXiv 2203.15556, for causal models |
| batch B | 4,096 slots (D / 3.2 million)^0.383 | exponent of nanochat, anchor of ours: the yardstick |
| rate of the matrices | 8e-3 | ours, docs/recipes.md; Muon's best rate hardly moves with the width, arXiv 2502.16982 |
| rate of the rest | 2e-3 sqrt(256 / H) | ours at H = 256; the exponent is nanochat's |
| decay of the matrices | 0.01 x 782 / steps | ours; rate x decay x steps is constant, arXiv 2405.13698 |

What is cited was measured by others, on other models: only the anchors are ours, each at one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neobert.config.load import split_arguments
from neobert.config.rules import BUDGETS
from neobert.errors import CallError

NAME = "dial"
"""The shipped config that `--depth` is about."""

TOKENS_PER_PARAMETER = 20.0
VOCABULARY = 30592
"""Rows that the laws count: those of bert-base-uncased. A vocabulary of another size changes no value."""

LENGTH = 512
DEEPEST = 128

MATRICES_LR = 8e-3
_ANCHOR_TOKENS, _ANCHOR_ROWS, _ANCHOR_STEPS, _ANCHOR_DECAY = 3.2e6, 8, 782, 0.01
_ANCHOR_WIDTH, _ANCHOR_REST_LR = 256, 2e-3
_MOST_ROWS_AT_ONCE = 8
_MOST_TOKENS_PER_PARAMETER = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DialSize:
    """What follows from a depth; see the table of the module."""

    depth: int
    tokens_per_parameter: float = TOKENS_PER_PARAMETER

    @property
    def width(self) -> int:
        """64 for each layer."""
        return 64 * self.depth

    @property
    def parameters(self) -> int:
        """12 d H^2 of the blocks and V H of the vocabulary; norms and rounding of the feed-forward width left out."""
        return 12 * self.depth * self.width**2 + VOCABULARY * self.width

    @property
    def tokens(self) -> int:
        """Row slots of the run: `tokens_per_parameter` times the parameters."""
        return math.ceil(self.tokens_per_parameter * self.parameters)

    @property
    def rows(self) -> int:
        """Rows of 512 in a step, by the 0.383th power of the tokens: even up to 16, then multiples of 16, which several
        processes share evenly."""
        exact = _ANCHOR_ROWS * (self.tokens / _ANCHOR_TOKENS) ** 0.383
        multiple = 2 if exact <= 16 else 16
        return max(multiple, multiple * round(exact / multiple))

    @property
    def micro_rows(self) -> int:
        """Rows that are computed at once: the largest divisor of `rows` that is at most 8."""
        return max(n for n in range(1, _MOST_ROWS_AT_ONCE + 1) if self.rows % n == 0)

    @property
    def steps(self) -> int:
        """Tokens by the slots of a step."""
        return max(1, math.ceil(self.tokens / (self.rows * LENGTH)))

    @property
    def rest_lr(self) -> float:
        """Peak rate of embeddings and vectors, by the square root of the width."""
        return _ANCHOR_REST_LR * math.sqrt(_ANCHOR_WIDTH / self.width)

    @property
    def decay(self) -> float:
        """Of the matrices: what is lost over a whole run is that of the yardstick."""
        return _ANCHOR_DECAY * _ANCHOR_STEPS / self.steps

    @property
    def flops(self) -> float:
        """Of a whole run, forward and backward: 6 for each parameter of the blocks and token, and of the vocabulary for
        the 30% that are predicted."""
        blocks, vocabulary = 12 * self.depth * self.width**2, VOCABULARY * self.width
        return 6 * (blocks + 0.3 * vocabulary) * self.steps * self.rows * LENGTH

    def values(self) -> dict[str, str]:
        """By key of a config, as written."""
        return {
            "model.name": f"dial-{self.depth}",
            "model.hidden_size": f"{self.width}",
            "model.num_hidden_layers": f"{self.depth}",
            "model.num_attention_heads": f"{self.depth}",
            "model.intermediate_size": f"{4 * self.width}",
            "optimizer.lr": f"{MATRICES_LR:.3g}",
            "optimizer.muon_config.muon_decay": f"{self.decay:.3g}",
            "optimizer.groups.embeddings.lr": f"{self.rest_lr:.3g}",
            "optimizer.groups.vectors.lr": f"{self.rest_lr:.3g}",
            "trainer.global_batch_size": f"{self.rows}",
            "trainer.per_device_train_batch_size": f"{self.micro_rows}",
            "trainer.max_tokens": f"{self.tokens}",
        }

    def overrides(self) -> list[str]:
        """The same, as overrides of `dial.yaml`."""
        return [f"{name}={value}" for name, value in self.values().items()]


def set_depth(file: str, overrides: Sequence[str]) -> list[str]:
    """The overrides with what `--depth` and `--tokens_per_parameter` of `dial` stand for in front.

    A budget that is typed replaces that of the law.

    Raises:
        CallError: one of the two is no number, or out of range, or of another config.
    """
    pairs, others = split_arguments(overrides)
    typed = {name: text for name, text in pairs if name in ("depth", "tokens_per_parameter")}
    if not typed:
        return list(overrides)
    if file != NAME:
        raise CallError(
            f"--{next(iter(typed))}: is of the shipped config {NAME} (`neobert pretrain {NAME} --depth 4`), and {file} "
            "has sizes of its own; set its keys instead"
        )
    depth, ratio = typed.get("depth", "4") or "", typed.get("tokens_per_parameter", f"{TOKENS_PER_PARAMETER}") or ""
    size = DialSize(depth=read_depth(depth), tokens_per_parameter=read_ratio(ratio))
    own = [(name, text) for name, text in pairs if name not in typed]
    has_budget = any(name in BUDGETS for name, _ in own)
    laws = [f"{name}={x}" for name, x in size.values().items() if not (has_budget and name in BUDGETS)]
    return [*laws, *(f"--{name}" if text is None else f"--{name}={text}" for name, text in own), *others]


def read_depth(text: str, flag: str = "--depth") -> int:
    """A number of layers. Raises CallError."""
    if not text.isdecimal() or not 1 <= int(text) <= DEEPEST:
        raise CallError(f"{flag}: {text!r}; write a number of layers from 1 to {DEEPEST}")
    return int(text)


def read_ratio(text: str) -> float:
    """Tokens for each parameter. Raises CallError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MOST_TOKENS_PER_PARAMETER:
        raise CallError(
            f"--tokens_per_parameter: {text!r}; write a number above 0, up to {_MOST_TOKENS_PER_PARAMETER}, such as 20"
        )
    return value


def describe_sizes(depths: Sequence[int], tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> str:
    """A table in Markdown of what the laws give."""
    lines = [
        "| depth | width | parameters | tokens | slots a step | steps | rate of matrices | of the rest | decay |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in (DialSize(depth=depth, tokens_per_parameter=tokens_per_parameter) for depth in depths):
        parameters, tokens = (f"{x / 1e6:,.{digits}f} M" for x, digits in ((size.parameters, 1), (size.tokens, 0)))
        lines.append(
            f"| {size.depth} | {size.width} | {parameters} | {tokens} | {size.rows * LENGTH:,} | {size.steps:,} | "
            f"{MATRICES_LR:.3g} | {size.rest_lr:.3g} | {size.decay:.3g} |"
        )
    return "\n".join(lines)
