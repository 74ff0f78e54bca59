"""What a run probes, read and fixed before the first step."""

import time
from dataclasses import dataclass

from neobert.config.schema import Config
from neobert.data.pipeline import DataPipeline
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError
from neobert.objectives.base import Objective
from neobert.train.probes.labelled_sets import ProbeSet, load_probe_set, name_sets
from neobert.train.probes.loss_bands import LossBands, build_loss_bands


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probes:
    """What is probed, ready to be asked again and again."""

    sets: tuple[ProbeSet, ...]
    losses: LossBands | None
    spent: dict[str, float]
    """Seconds of each probe in this start of the run; `log_probes` adds to it."""

    started: float
    """Of this start of the run, by `time.perf_counter`."""

    warned: set[str]
    """Probes that were said to be expensive."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of each set: results with the same one can be compared."""
        return {one.name: one.fingerprint for one in self.sets}


def build_probes(config: Config, objective: Objective, data: object, tokenizer: Tokenizer) -> Probes | None:
    """What a run probes; None where nothing is asked for.

    Raises:
        DataError: a set cannot be used, or there is nothing to probe.
    """
    trainer, started = config.trainer, time.perf_counter()
    if trainer.probe_steps is None:
        return None
    names = name_sets(trainer.probe_sets)
    length = min(config.dataset.max_seq_length, config.model.max_position_embeddings)
    sets = tuple(
        load_probe_set(path, name, tokenizer, most=trainer.probe_examples, seed=trainer.probe_seed, max_length=length)
        for path, name in zip(trainer.probe_sets, names)
    )
    losses = None
    if objective.target_losses is not None:
        assert isinstance(data, DataPipeline), "what an objective with losses of targets reads"
        losses = build_loss_bands(data, tokenizer, trainer.probe_tokens)
    if not sets and losses is None:
        raise DataError(
            f"trainer.probe_steps: {trainer.probe_steps}, but there is nothing to probe: no trainer.probe_sets and no "
            "held-out documents whose loss could be looked at; name a set, or remove the key"
        )
    return Probes(sets=sets, losses=losses, spent={}, started=started, warned=set())
