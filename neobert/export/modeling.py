"""Transformers' classes around the encoder, for architectures that transformers does not ship itself.

Texts go through the model without padding: the real tokens of a batch become one stream, each row (or each document of
a packed row) a segment of its own, and the hidden states are put back into their slots. Slots of padding are zero.

Positions are counted within each document, over its real tokens, as in training. So padding may be on either side.

What a model takes is written out in its `forward`: transformers' Trainer drops every column that is not there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.layers import PredictionHead
from neobert.model.segments import Segments

_OF_THE_VOCABULARY = [r"^decoder\.", r"^prediction_head\.", r"^logit_scale$"]
"""Weights of the projection that models of labels do without."""


class NeobertEncoderConfig(PreTrainedConfig):
    """`architecture` holds the fields of ModelConfig; some are beside it under the names that libraries look for."""

    model_type = "neobert_encoder"
    has_no_defaults_at_init = True

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        attn_backend: str = "sdpa",
        classifier_pooling: str = "mean",
        **kwargs: Any,
    ) -> None:
        if architecture is None:
            raise ValueError("architecture: missing; load this config with from_pretrained")
        vocab_size = kwargs.pop("vocab_size", architecture["vocab_size"])
        architecture = {**architecture, "vocab_size": vocab_size}
        for name in ("pad_token_id", "tie_word_embeddings"):
            kwargs[name] = kwargs.get(name, architecture[name])
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            kwargs[name] = architecture[name]
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.architecture = architecture
        self.attn_backend = attn_backend
        self.classifier_pooling = classifier_pooling


class NeobertEncoderPreTrainedModel(PreTrainedModel):
    """What the models below have in common."""

    config_class = NeobertEncoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True  # The encoder has the switch that transformers looks for in all modules.

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class NeobertEncoderModel(NeobertEncoderPreTrainedModel):
    """The encoder: hidden states of a padded or packed batch."""

    def __init__(self, config: NeobertEncoderConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(
            ModelConfig.from_dict({**config.architecture, "vocab_size": config.vocab_size}),
            ATTENTION[config.attn_backend],
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embedding = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states `[B, S, H]` of tokens `[B, S]`.

        Args:
            input_ids: int `[B, S]`.
            attention_mask: `[B, S]`, nonzero for real tokens; None when all are.
            position_ids: `[B, S]` or `[1, S]`; None counts within each document.
            segment_ids: int `[B, S]` for packed rows: 0 for padding, else the number of the document in its row.
            output_hidden_states: Also the embeddings and the output of every block, the last one normalised.
            return_dict: False for a tuple.
            kwargs: Not used; callers of transformers pass some for all models.
        """
        kept, positions, segments = _stream(input_ids, attention_mask, position_ids, segment_ids)
        architecture = self.encoder.config
        if not architecture.rope and len(positions) and int(positions.max()) >= architecture.max_position_embeddings:
            raise ValueError(
                f"input_ids: a document is longer than the {architecture.max_position_embeddings} positions that the "
                "model has; truncate it"
            )
        states: list[Tensor] = []
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hooks = [
            block.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
            for block in (self.encoder.layers if want_states else ())
        ]
        try:
            hidden = self.encoder(input_ids.flatten()[kept][None], positions[None], segments)
        finally:
            for hook in hooks:
                hook.remove()
        padded = [_put_back(x, kept, input_ids.shape) for x in (*states, hidden)]
        output = BaseModelOutput(last_hidden_state=padded[-1], hidden_states=tuple(padded) if want_states else None)
        return output if return_dict is None or return_dict else output.to_tuple()


class NeobertEncoderForMaskedLM(NeobertEncoderPreTrainedModel):
    """The encoder with its vocabulary projection."""

    _tied_weights_keys = {"decoder.weight": "model.encoder.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: NeobertEncoderConfig) -> None:
        super().__init__(config)
        self.model = NeobertEncoderModel(config)
        architecture = self.model.encoder.config
        self.prediction_head = PredictionHead(architecture) if architecture.prediction_head else nn.Identity()
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=architecture.decoder_bias)
        self.logit_scale: nn.Parameter | None = None
        if architecture.ngpt:
            self.logit_scale = nn.Parameter(torch.full((config.vocab_size,), architecture.scale_base))
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As for every model; a new token's logit scale starts at the mean of the others."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.logit_scale is not None:
            old, size = self.logit_scale.detach(), embedding.num_embeddings
            new = old.mean().expand(max(0, size - len(old)))
            self.logit_scale = nn.Parameter(torch.cat((old[:size], new)))
        return embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Logits `[B, S, V]`; with `labels` `[B, S]` (-100 for none) also the mean cross entropy in nats."""
        states = self.model(input_ids, attention_mask, position_ids, segment_ids, return_dict=True, **inputs)
        logits = self.decoder(self.prediction_head(states.last_hidden_state))
        if self.logit_scale is not None:
            logits = logits * (self.logit_scale / self.model.encoder.config.scale_base)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=states.hidden_states)
        return output if return_dict is None or return_dict else output.to_tuple()


class NeobertEncoderForSequenceClassification(NeobertEncoderPreTrainedModel):
    """The encoder with a classifier over the mean (or the first) hidden state: dense, GELU, projection."""

    _keys_to_ignore_on_load_unexpected = _OF_THE_VOCABULARY

    def __init__(self, config: NeobertEncoderConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels)  # type: ignore[arg-type]
        self.model = NeobertEncoderModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Logits `[B, labels]`; with `labels` also the loss of `config.problem_type`."""
        states = self.model(input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
        hidden = states.last_hidden_state
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0
        if self.config.classifier_pooling == "mean":
            weights = real.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        elif self.config.classifier_pooling == "cls":
            first = real.to(torch.int64).argmax(1)  # Padding may be on the left.
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), first]
        else:
            raise ValueError(f"classifier_pooling: {self.config.classifier_pooling!r} is unknown; write mean or cls")
        logits = self.classifier(F.gelu(self.dense(pooled)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states.hidden_states)
        return output if return_dict is None or return_dict else output.to_tuple()


class NeobertEncoderForTokenClassification(NeobertEncoderPreTrainedModel):
    """The encoder with a projection of every hidden state to labels."""

    _keys_to_ignore_on_load_unexpected = _OF_THE_VOCABULARY

    def __init__(self, config: NeobertEncoderConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels)  # type: ignore[arg-type]
        self.model = NeobertEncoderModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Logits `[B, S, labels]`; with `labels` `[B, S]` (-100 for none) also the mean cross entropy in nats."""
        states = self.model(input_ids, attention_mask, position_ids, segment_ids, return_dict=True, **inputs)
        logits = self.classifier(states.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=states.hidden_states)
        return output if return_dict is None or return_dict else output.to_tuple()


def _stream(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Segments]:
    """Slots of the real tokens, their positions, and the segments of the stream they make."""
    rows = input_ids.shape[0]
    numbers = torch.ones_like(input_ids) if segment_ids is None else segment_ids.to(input_ids)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape or bool((attention_mask < 0).any()):
            raise ValueError(
                f"attention_mask: shape {list(attention_mask.shape)} for tokens {list(input_ids.shape)}; give one value"
                " a token, 1 for real tokens and 0 for padding"
            )
        numbers = numbers * (attention_mask != 0)
    kept = numbers.flatten().nonzero()[:, 0]
    documents = numbers + torch.arange(rows, device=numbers.device)[:, None] * (numbers.amax() + 1)
    _, lengths = torch.unique_consecutive(documents.flatten()[kept], return_counts=True)
    borders = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    if position_ids is None:
        starts = torch.repeat_interleave(borders[:-1], lengths)
        positions = torch.arange(len(kept), device=starts.device) - starts
    else:
        positions = position_ids.expand_as(input_ids).flatten()[kept]
    segments = Segments(
        ids=torch.ones(1, len(kept), dtype=torch.int32, device=input_ids.device),
        cu_seqlens=borders,
        cu_seqlens_cpu=borders.cpu(),
        max_seqlen=int(lengths.max()) if len(lengths) else 0,
    )
    return kept, positions, segments


def _put_back(stream_TH: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """The stream in its slots `[B, S, H]`, zeros elsewhere."""
    slots = stream_TH.new_zeros(shape.numel(), stream_TH.shape[-1])
    return slots.index_copy(0, kept, stream_TH).view(*shape, -1)
