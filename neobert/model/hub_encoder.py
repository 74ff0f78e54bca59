"""An encoder of transformers (BERT, RoBERTa, ModernBERT, ...) that is called as ours are.

Our batches are texts side by side. Here every text becomes a row, padded to the longest one behind an attention mask
(on a CPU to the longest of its group: texts of like lengths go together), and the hidden states go back to the slots
that the tokens came from. Positions are counted by the model itself. Where it knows two kinds of tokens, those after
the first [SEP] of a text are of the second kind; every text ends with [SEP], so its last token says which one that is.

Its dropout is what its own config says.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neobert.model.attention import ATTENTION, AttentionBackend
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments

BACKBONE = "backbone."
"""What names of weights of these models start with, below those of an encoder."""


class HubEncoder(Encoder):
    """The encoder of a ModelConfig with `hub_config`."""

    def __init__(self, config: ModelConfig, *, gradient_checkpointing: bool = False) -> None:
        nn.Module.__init__(self)
        assert config.hub_config is not None, "the caller has looked"
        self.config, self.attention, self.observe = config, ATTENTION["sdpa"], None
        self.windows = (None,) * config.num_hidden_layers
        self.backbone = build_backbone(config.hub_config)
        if gradient_checkpointing:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        accepted = inspect.signature(self.backbone.forward).parameters
        # Not where the model reads the tokens for more than their rows (ESM), or its table is not a plain one (I-BERT).
        plain = type(self.embedding) is nn.Embedding and not config.hub_config.get("token_dropout", False)
        self._takes_rows = plain and "inputs_embeds" in accepted
        self._has_types = "token_type_ids" in accepted and config.hub_config.get("type_vocab_size", 1) > 1

    @property
    def embedding(self) -> nn.Embedding:  # type: ignore[override]
        """The table of tokens."""
        table: nn.Embedding = self.backbone.get_input_embeddings()
        return table

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The blocks."""
        found = [x for x in self.backbone.modules() if isinstance(x, nn.ModuleList)]
        return max(found, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))

    def unit_matrices(self) -> list[Any]:
        return []

    def forward(self, input_ids: Tensor, positions: Tensor, segments: Segments) -> Tensor:
        """Hidden states `[B * S, H]` of tokens `[B, S]`; see `Encoder.forward`."""
        ids_T, device = input_ids.flatten().long(), input_ids.device
        # On a CPU padding costs what tokens cost; on a GPU a few rows more or less cost nothing.
        groups, place_T = plan_rows(
            segments.cu_seqlens_cpu, segments.ids.flatten().cpu() > 0, shortest=0.75 if device.type == "cpu" else 0.0
        )
        # Once for all groups: each lookup has a gradient as large as the table.
        rows_TH = self.embedding(ids_T) if self._takes_rows else None
        hidden = [self._run(ids_T, rows_TH, slots_NL.to(device)) for slots_NL in groups]
        return torch.cat(hidden).index_select(0, place_T.to(device))

    def _run(self, ids_T: Tensor, rows_TH: Tensor | None, slots_NL: Tensor) -> Tensor:
        """Hidden states `[N * L, H]` of rows of slots, -1 for padding."""
        is_token_NL = slots_NL >= 0
        slots, arguments = slots_NL.clamp(min=0), {"attention_mask": is_token_NL.long()}
        if rows_TH is None:
            arguments["input_ids"] = ids_T[slots].masked_fill(~is_token_NL, self.config.pad_token_id)
        else:
            arguments["inputs_embeds"] = rows_TH.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        if self._has_types:
            ids_NL = ids_T[slots]
            last_N1 = ids_NL.gather(1, is_token_NL.sum(1, keepdim=True) - 1)
            is_end_NL = ((ids_NL == last_N1) & is_token_NL).long()
            arguments["token_type_ids"] = (is_end_NL.cumsum(1) - is_end_NL).clamp(max=1) * is_token_NL
        hidden: Tensor = self.backbone(**arguments).last_hidden_state
        return hidden.flatten(0, 1)

    def flops_per_token(self, *, attended_length: float, predicted_fraction: float) -> float:
        """As `Encoder.flops_per_token`, from the matrices that there are."""
        weights = sum(p.numel() for p in self.layers.parameters() if p.ndim > 1)
        return 6 * weights + 12 * self.config.hidden_size * attended_length * len(self.layers)


_FEWEST_SLOTS = 512
"""Slots of a group, if there are so many: products of fewer rows take hardly less time."""


def plan_rows(borders: Tensor, is_text_T: Tensor, *, shortest: float) -> tuple[list[Tensor], Tensor]:
    """Texts as padded rows, those of like lengths together, and where the hidden state of each slot then is.

    Args:
        borders: of the segments, on the host: `Segments.cu_seqlens_cpu`.
        is_text_T: false for slots of padding, which no row is made of; their hidden states are those of a token.
        shortest: length of the shortest row of a group, as a fraction of the longest; 0 makes one group.

    Returns:
        For each group int64 `[N, L]`, the slot of each token of a row, -1 for padding; and int64 `[T]`, the index of
        each slot among the tokens and paddings of all groups.
    """
    lengths = borders.diff()
    is_real = (lengths > 0) & is_text_T[borders[:-1].long().clamp(max=len(is_text_T) - 1)]
    starts, lengths = borders[:-1][is_real].long(), lengths[is_real].long()
    order = torch.argsort(lengths, descending=True, stable=True)
    place_T = torch.zeros_like(is_text_T, dtype=torch.int64)
    groups, first, base = list[Tensor](), 0, 0
    while first < len(order):
        longest = int(lengths[order[first]])
        inside = int((lengths[order[first:]] >= shortest * longest).sum())
        inside = max(inside, _FEWEST_SLOTS // longest)  # All that are left, if these are fewer.
        chosen = order[first : first + inside]
        offsets_L = torch.arange(longest)
        slots_NL = torch.where(offsets_L < lengths[chosen][:, None], starts[chosen][:, None] + offsets_L, -1)
        is_token = slots_NL.flatten() >= 0
        place_T[slots_NL.flatten()[is_token]] = base + torch.nonzero(is_token).squeeze(1)
        groups.append(slots_NL)
        first, base = first + inside, base + slots_NL.numel()
    return groups, place_T


def build_encoder_of(
    config: ModelConfig,
    attention: AttentionBackend,
    *,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_every: int = 1,
) -> Encoder:
    """The encoder of a config, with initial weights; arguments as of `Encoder`."""
    if config.hub_config is not None:
        return HubEncoder(config, gradient_checkpointing=gradient_checkpointing)
    return Encoder(
        config,
        attention,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_every=gradient_checkpointing_every,
    )


def build_backbone(hub_config: Mapping[str, Any]) -> Any:
    """The model of a config.json with initial weights, without a pooler.

    Raises:
        ValueError: transformers has no such model.
    """
    from transformers import AutoConfig, AutoModel

    values = {name: value for name, value in hub_config.items() if name != "model_type"}
    config = AutoConfig.for_model(str(hub_config.get("model_type")), **values)
    if type(config) not in AutoModel._model_mapping:
        raise ValueError(f"config.json: model_type {hub_config.get('model_type')!r} has no encoder in transformers")
    kind: Any = AutoModel._model_mapping[type(config)]
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        return kind(config, add_pooling_layer=False)
    return kind(config)


def load_backbone(folder: str, hub_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of such a model in a folder, by the names of a HubEncoder, fp32.

    Raises:
        ValueError: weights are missing.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        expected = {name: x.shape for name, x in build_backbone(hub_config).state_dict().items()}
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    found, fresh = model.state_dict(), {str(name) for name in report["missing_keys"]}  # These have random values.
    missing = [name for name, x in expected.items() if name in fresh or name not in found or found[name].shape != x]
    if missing:
        raise ValueError(f"its weights lack {', '.join(missing[:3])}, which its config.json describes")
    return {f"{BACKBONE}{name}": found[name] for name in expected}


_SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "longformer", "ibert")
"""Types of models that count positions from the one after the id of padding."""


def describe_backbone(hub_config: Mapping[str, Any], *, longest: int, pad_token_id: int) -> ModelConfig:
    """What of a config.json our code wants to know.

    Args:
        longest: tokens of the longest text that its tokenizer is meant for.

    Raises:
        ValueError: it lacks a size.
    """
    from transformers import AutoConfig

    kind = str(hub_config.get("model_type"))
    config = AutoConfig.for_model(kind, **{name: x for name, x in hub_config.items() if name != "model_type"})
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size")
    missing = [name for name in sizes if getattr(config, name, None) is None]
    if missing or config.is_encoder_decoder:
        raise ValueError(f"model_type {kind!r} is no encoder that can be used here (no {', '.join(missing) or kind})")
    shift = config.pad_token_id + 1 if kind in _SHIFTED else 0
    return ModelConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=getattr(config, "intermediate_size", 4 * config.hidden_size),
        max_position_embeddings=min(config.max_position_embeddings - shift, longest),
        rope=False,
        rms_norm=False,
        hidden_act="gelu",
        vocab_size=config.vocab_size,
        pad_token_id=pad_token_id,
        hub_config=dict(hub_config),
    )
