"""Encoder: embedding -> blocks -> final norm, on one flat stream of tokens.

A batch `[B, S]` is read as T = B * S tokens in a row. Documents are separated by the attention alone, so packed and
padded batches take the same path, and no row of the attention is ever empty.

Initial weights: see `init.py`. The default, uniform, is what NeoBERT was trained with (arXiv 2502.19587 and its code).
With `ngpt` blocks, norms and initial weights are those of the normalised model, see `ngpt.py`.

Legend: T tokens of the flat stream, H hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.model.init import initialise, scale_residual_output
from neobert.model.layers import EncoderBlock, build_norm
from neobert.model.ngpt import NormalizedBlock, UnitMatrix, normalise_, unit_matrices
from neobert.model.rotary import rotary_table
from neobert.model.segments import Segments

Observe = Callable[[int, Tensor, tuple[Tensor, Tensor] | None, Tensor, Segments], None]
"""`fn(layer, x_TH, rotation, positions_BS, segments)`: what the block of a layer is about to read."""


class Encoder(nn.Module):
    """The encoder of a ModelConfig.

    State-dict names: `embedding.weight`, `position_embedding.weight` (only when `rope` is false),
    `layers.N.{attention_norm,qkv,out,ffn_norm,gate_up,down}.weight` (`up` instead of `gate_up` with GELU, no
    `attention_norm` in the first block where the config asks for that), `norm.weight`; `embedding_norm.weight` and
    `layers.N.{q_norm,k_norm}.weight` where the config asks for them. With `ngpt` there are no norms, but
    `layers.N.{attention_rate,ffn_rate,qk_scale,gate_up_scale}`.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionBackend,
        *,
        gradient_checkpointing: bool = False,
        gradient_checkpointing_every: int = 1,
    ) -> None:
        """`gradient_checkpointing` keeps only the input of every k-th block and computes the rest of it again in the
        backward, with `gradient_checkpointing_every` k; the others keep their activations."""
        super().__init__()
        self.config = config
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.gradient_checkpointing_every = gradient_checkpointing_every
        self.observe: Observe | None = None
        """Called before each block, for measurements; it must not change its arguments."""

        layers = range(config.num_hidden_layers)
        self.windows = tuple(config.window_of_layer(layer) for layer in layers)
        self.thetas = tuple(config.theta_of_layer(layer) for layer in layers)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.rope:
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.embedding_norm:
            self.embedding_norm = build_norm(config)
        self.layers = nn.ModuleList(_build_block(config, attention, layer) for layer in layers)
        self.norm = nn.Identity() if config.ngpt else build_norm(config)
        self.apply(partial(initialise, config=config))
        for name, weight in self.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                scale_residual_output(weight, config)
        normalise_(self.unit_matrices())

    def unit_matrices(self) -> list[UnitMatrix]:
        """The matrices whose vectors have length 1 along a dimension, after every optimizer step too: with `ngpt`."""
        return [(self.embedding.weight, 1), *unit_matrices(self.layers)] if self.config.ngpt else []

    def forward(self, input_ids: Tensor, positions: Tensor, segments: Segments) -> Tensor:
        """Hidden states `[B * S, H]` of tokens `[B, S]` at `positions` `[B, S]` of their documents.

        The dtype is the embedding's (fp32 under autocast). Hidden states of padding mean nothing.
        """
        prepared = {window: self.attention.prepare(segments, window) for window in dict.fromkeys(self.windows)}
        positions_T = positions.flatten()
        x_TH = F.embedding(input_ids.flatten(), self.embedding.weight)
        rotations: dict[float, tuple[Tensor, Tensor]] = {}
        if self.config.rope:
            head_dim = self.config.head_dim
            rotations = {theta: rotary_table(positions_T, head_dim, theta) for theta in dict.fromkeys(self.thetas)}
        else:
            x_TH = x_TH + F.embedding(positions_T, self.position_embedding.weight)
        if self.config.embedding_norm:
            x_TH = self.embedding_norm(x_TH)
        for layer, (block, window, theta) in enumerate(zip(self.layers, self.windows, self.thetas)):
            rotation = rotations.get(theta)
            if self.observe is not None:
                self.observe(layer, x_TH, rotation, positions, segments)
            if self.gradient_checkpointing and self.training and layer % self.gradient_checkpointing_every == 0:
                x_TH = checkpoint(block, x_TH, rotation, prepared[window], use_reentrant=False)
            else:
                x_TH = block(x_TH, rotation, prepared[window])
        return self.norm(x_TH)

    @property
    def block_weight(self) -> Tensor:
        """A matrix of the blocks: its dtype is that of their products."""
        return next(p for p in self.layers.parameters() if p.ndim > 1)

    def num_parameters(self) -> int:
        """Number of weights, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, *, attended_length: float, predicted_fraction: float) -> float:
        """Floating-point operations of forward and backward per token, without recomputation.

        6 W + 12 H (s_1 + ... + s_L) + 6 p H V, where W is the number of weights in the L blocks' matrices,
        L (4 H^2 + 3 H F) where the activation is gated and L (4 H^2 + 2 H F) with GELU; s = `attended_length` is the
        mean over tokens of the length of their own document, sum(length^2) / sum(length), and s_n the same, in a layer
        with a window of w at most 2 (w // 2) + 1; p = `predicted_fraction` is the fraction of tokens that go through
        the vocabulary projection of V rows, with `prediction_head` V + H. A multiply-add counts 2, the backward twice
        the forward; lookups, norms and activations count nothing.
        """
        c = self.config
        matrices = 3 if c.is_gated else 2
        weights = c.num_hidden_layers * (4 * c.hidden_size**2 + matrices * c.hidden_size * c.ffn_size)
        seen = (attended_length if w is None else min(attended_length, 2 * (w // 2) + 1) for w in self.windows)
        attention = 12 * c.hidden_size * sum(seen)
        rows = c.vocab_size + (c.hidden_size if c.prediction_head else 0)
        return 6 * weights + attention + 6 * predicted_fraction * c.hidden_size * rows


def _build_block(config: ModelConfig, attention: AttentionBackend, layer: int) -> nn.Module:
    if config.ngpt:
        return NormalizedBlock(config, attention)
    return EncoderBlock(config, attention, attention_norm=config.first_attention_norm or layer > 0)
