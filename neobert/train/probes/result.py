"""What probes found, for the record."""

import math
from dataclasses import dataclass
from typing import Any

from neobert.train.probes.loss_bands import BandLoss

LOSSES = "losses"
"""Name of the probe of held-out losses, among those of sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What one kind of weights says."""

    sets: dict[str, dict[str, float | None]]
    """By set: `knn` and `ridge`, accuracies, or `spearman`; None where the vectors are not finite."""

    losses: dict[str, dict[str, BandLoss]]

    def as_line(self) -> dict[str, Any]:
        parts = {name: {band: x.loss for band, x in bands.items()} for name, bands in self.losses.items()}
        finite = {
            name: {band: x if math.isfinite(x) else None for band, x in part.items()} for name, part in parts.items()
        }
        targets = {name: {band: x.num_targets for band, x in bands.items()} for name, bands in self.losses.items()}
        return {"sets": self.sets, LOSSES: finite, "targets": targets}

    def as_values(self) -> dict[str, float]:
        """By names such as `probe/sst2/knn` and `probe/loss/frequency/1-100`."""
        sets = {f"probe/{key}/{name}": x for key, found in self.sets.items() for name, x in found.items()}
        losses = {f"probe/loss/{key}/{band}": x.loss for key, bands in self.losses.items() for band, x in bands.items()}
        return {name: value for name, value in (sets | losses).items() if value is not None}

    def describe(self) -> str:
        parts = [
            f"{key}: " + ", ".join(f"{name} {'-' if x is None else f'{x:.4f}'}" for name, x in found.items())
            for key, found in self.sets.items()
        ]
        parts += [
            f"loss by {key.replace('_', ' ')}: " + ", ".join(f"{band} {x.loss:.3f}" for band, x in bands.items())
            for key, bands in self.losses.items()
        ]
        return " | ".join(parts)
