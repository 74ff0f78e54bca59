"""Which tokens the model predicts, counted while it trains, for masks that follow it (`datacollator.mask_weights`).

Counts are integers, so neither micro-batches nor the number of processes change a sum. What is counted is on the
batch of a step before the model learns from it, in evaluation mode.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from neobert.data.pipeline import DataPipeline
from neobert.inference.packed import evaluating
from neobert.objectives.base import ObjectiveModule
from neobert.objectives.masking import MaskPolicy
from neobert.objectives.mlm import target_hits
from neobert.objectives.token_weights import TokenWeights
from neobert.train.hardware.machine import Runtime
from neobert.types import IGNORE_INDEX, PackedBatch, StepBatch

HARD_TOKENS_FILE = "mask_weights.safetensors"
"""Of a checkpoint: `before` and `after` of `TokenWeights.counts`, and `counted`, all `[2, V]`."""


def find_token_weights(data: object) -> TokenWeights | None:
    """The weights that the masks of a run's data are drawn with; None where all tokens are equal."""
    if not isinstance(data, DataPipeline) or not isinstance(data.collate.policy, MaskPolicy):
        return None
    return data.collate.policy.token_weights


def wait_for_weights(data: DataPipeline, weights: TokenWeights) -> DataPipeline:
    """The data of a run that trains: what reads ahead of it waits for weights that are not known yet."""
    return replace(data, loader_settings=replace(data.loader_settings, is_ready=weights.is_known))


class HardTokens:
    """Counts targets, and which of them are predicted, and refreshes the weights of tokens."""

    def __init__(self, module: ObjectiveModule, weights: TokenWeights, runtime: Runtime) -> None:
        self.weights, self._module, self._runtime = weights, module, runtime
        self._counted = torch.zeros(2, weights.num_tokens, dtype=torch.int64, device=runtime.device)

    def begin(self, step: int, saved: Mapping[str, Tensor] | None) -> None:
        """Continues at `step` with what `read` returned there, or with equal weights."""
        self._counted.zero_()
        if saved is None:
            self.weights.begin(step)
            return
        self.weights.begin(step, {name: saved[name].numpy() for name in ("before", "after")})
        if self._runtime.is_main:  # Sums of all ranks.
            self._counted += saved["counted"].to(self._counted.device)

    def read(self) -> dict[str, Tensor]:
        """What has to be saved, on the host. Collective."""
        counts = {name: torch.from_numpy(count.copy()) for name, count in self.weights.counts.items()}
        return {**counts, "counted": self._runtime.sum_on_device(self._counted.clone()).cpu()}

    @torch.no_grad()
    def measure(self, step: int, batch: StepBatch) -> None:
        """Counts the targets of the batch of `step`, on the device, where they belong to a refresh."""
        if not self.weights.is_measured(step):
            return
        with evaluating(self._module), self._runtime.accelerator.autocast():
            for micro in batch.micro_batches:
                assert isinstance(micro, PackedBatch), "what this objective reads"
                if micro.segments.causal:  # Steps of `datacollator.clm_steps`: nothing is hidden.
                    continue
                hits, tokens = target_hits(self._module, micro), micro.targets.clamp(min=0)
                self._counted[0].index_add_(0, tokens, hits.to(torch.int64))
                self._counted[1].index_add_(0, tokens, (micro.targets != IGNORE_INDEX).to(torch.int64))

    def refresh(self, step: int) -> None:
        """Fixes the next weights where they are due after `step` steps. Collective; waits for the device."""
        if self.weights.is_due(step):
            self.weights.refresh(step, self._runtime.sum_on_device(self._counted).cpu().numpy())
            self._counted.zero_()
