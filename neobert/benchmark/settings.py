"""What the benchmarks of steps and kernels can be asked for; command lines read it without torch."""

from dataclasses import dataclass
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "quickstart": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1056},
    "neobert": {"hidden_size": 768, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""Shapes by name; `neobert` is that of the paper, `small` the one of docs/performance.md."""

SHAPES = {
    "13k,768,30592": (13312, 768, 30592),
    "13k,768,50k": (13312, 768, 50304),
    "4k,1024,256k": (4096, 1024, 256000),
}
"""M, D, V: BERT-like vocabularies at 64 rows of 1,024 with 20% masks, and one of 256,000."""

PRECISIONS = ("auto", "bf16", "fp32")
"""Of matrix products. auto: on a CPU the one that is measured to be faster, with products of the model's shape; bf16 on
a GPU that has it."""

CONTESTANTS = ("ours", "compiled", "reference", "transformers")
"""Who takes part in the comparison with transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What is measured."""

    preset: str = "small"
    vocab_size: int = 30592
    tied: bool = False
    length: int = 512
    rows: int = 8
    mean_document: float = 250.0
    """Of the log-normal distribution, in tokens."""

    probability: float = 0.2
    precision: str = "auto"
    """Of PRECISIONS."""

    bf16_residual: bool = False
    """As `trainer.bf16_residual`."""

    fp8: str = "no"
    """As `trainer.fp8`."""

    attention: str = "auto"
    """A backend, or `masked`: one product over whole rows with a mask."""

    kernel: str = "auto"
    compile: bool = False
    compile_backend: str = "inductor"
    """With compile: as `trainer.torch_compile_backend`."""

    gradient_checkpointing: bool = False
    checkpointing_every: int = 1
    """With gradient_checkpointing: every k-th block is computed again."""

    all_positions: bool = False
    """Logits of every slot, not of the predicted ones alone."""

    padded: bool = False
    """One document to a row."""

    plain_adamw: bool = False
    """AdamW one tensor at a time."""

    steps: int = 20
    warmup: int = 5
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class AgainstSettings:
    """What is compared."""

    text: str
    """JSONL file (or .gz) with a field `text`."""

    tokenizer: str
    """Folder of the tokenizer."""

    preset: str = "small"
    length: int = 512
    rows: int = 8
    """Packed rows of a step; without packing as many pieces as these hold on average."""

    precision: str = "auto"
    """Of PRECISIONS."""

    steps: int = 10
    warmup: int = 3
