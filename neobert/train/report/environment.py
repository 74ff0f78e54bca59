"""What a start of a run notes of its machine and its model, for the report."""

import platform
from typing import TYPE_CHECKING, Any

from neobert.host import describe_cpu
from neobert.train.hardware.machine import choose_compile, describe_precision
from neobert.train.processes.agreement import PACKAGES, READERS, digest_code, version
from neobert.weights.vocabulary import VOCABULARY_TENSORS

if TYPE_CHECKING:
    from neobert.train.run import Run


def describe_environment(run: "Run") -> dict[str, Any]:
    """The machine that computes, with the versions that compute, and the model, both JSON-ready."""
    config, model = run.config, run.model_config
    weights = {name: p.numel() for name, p in run.module.named_parameters()}
    machine = {
        "device": run.runtime.describe_device(),
        "processes": run.runtime.world,
        "precision": describe_precision(config),
        "attention": run.attention.describe(),
        "compiled": choose_compile(config),
        "cpu": describe_cpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "code": digest_code(),
        **{name: version(name) for name in (*PACKAGES, *READERS)},
    }
    architecture = {
        "name": config.model.name or "NeoBERT",
        "objective": run.objective.title,
        "layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "attention_heads": model.num_attention_heads,
        "vocabulary": model.vocab_size,
        "parameters": sum(weights.values()),
        "parameters_without_the_vocabulary": sum(n for name, n in weights.items() if name not in VOCABULARY_TENSORS),
        "rows_a_step": run.rows_per_step,
        "steps_of_the_run": run.num_steps,
    }
    return {"machine": machine, "model": architecture}
