"""A key of resume class `free` changes nothing that is learned: three steps after a resume with another value of it are
bit-equal to those without.

Keys are tried together, some in groups of their own because they exclude each other; where a group differs, each of its
keys is tried alone to name the one. What cannot be tried is in `UNTRIED` with the reason.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from records import log_lines

from neobert.config.fields import FIELDS
from neobert.config.schema import Config
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]

BASES: dict[str, list[str]] = {
    "dropout": ["model.dropout_prob=0.1"],
    "muonclip": ["optimizer.name=muonclip", "optimizer.muon_config.clipping_interval=1", "model.dropout_prob=0.1"],
    "biased": ["model.decoder_bias=true"],
    "unpacked": ["datacollator.pack_sequences=false"],
}
"""Runs of four steps, of which each trial continues one."""

TRIED: list[tuple[str, dict[str, str]]] = [
    (
        "dropout",
        {
            "model.name": "another",
            "model.init_from": "outputs/nowhere",
            "model.init_weights": "ema",
            "model.init_layers": "[0]",
            "model.init_tile": "true",
            "model.init_drop_decoder_bias": "true",
            "model.embedding_init_range": "0.5",
            "model.decoder_init_range": "0.5",
            "model.attn_backend": "sdpa",  # Of a CPU; those of a GPU round elsewhere.
            "model.kernel_backend": "torch",
            "dataset.pre_tokenize_output": "outputs/nowhere",
            "dataset.num_proc": "1",
            "dataset.cache_dir": "outputs/nowhere",
            "dataset.network_retries": "1",
            "dataset.num_workers": "0",
            "dataset.prefetch_factor": "1",
            "dataset.persistent_workers": "false",
            "dataset.pin_memory": "false",
            "tokenizer.path": "outputs/nowhere",  # The checkpoint has it; another one has another digest.
            "tokenizer.trust_remote_code": "true",
            "tokenizer.max_length": "32",
            "tokenizer.allow_special_token_rewrite": "true",
            "datacollator.max_length": "32",
            "trainer.per_device_eval_batch_size": "3",
            "trainer.gradient_accumulation_steps": "1",  # Another number is another trainer.global_batch_size.
            "trainer.overwrite_output_dir": "true",
            "trainer.resume_allow": "[seed]",
            "trainer.save_steps": "2",
            "trainer.save_total_limit": "1",
            "trainer.save_milestone_steps": "[5]",
            "trainer.save_milestone_every": "3",
            "trainer.save_best": "true",
            "trainer.async_save": "true",
            "trainer.eval_steps": "1",
            "trainer.logging_steps": "1",
            "trainer.log_train_accuracy": "true",
            "trainer.log_weight_norms": "false",
            "trainer.health_checks": "false",
            "trainer.log_statistics": "true",
            "trainer.gradient_checkpointing": "true",
            "trainer.gradient_checkpointing_every": "2",
            "trainer.tf32": "false",
            "trainer.torch_compile_backend": "eager",
            "trainer.torch_compile_dynamic": "true",
            "trainer.device": "cpu",
            "trainer.report_to": "none",
            "trainer.console": "quiet",
            "trainer.disable_tqdm": "true",
            "trainer.detect_anomaly": "true",
            "trainer.max_hours": "10",
            "trainer.rank_timeout_seconds": "60",
            "trainer.replay_audit": "strict",
            "trainer.profiler_steps_start": "6",
            "trainer.profiler_steps": "1",
            "trainer.fill_mask_texts": "['the [MASK] sat']",
            "trainer.probe_steps": "2",
            "trainer.probe_tokens": "100",
            "wandb.project": "another",
            "wandb.entity": "another",
            "wandb.name": "another",
            "wandb.tags": "[another]",
            "wandb.mode": "offline",
            "wandb.dir": "outputs/nowhere",
            "wandb.resume": "allow",
            "wandb.watch": "all",
        },
    ),
    (
        "dropout",
        {
            "model.init": "megatron",
            "model.init_std": "0.5",
            "model.init_zero_residual": "true",
            "tokenizer.train": "true",
            "tokenizer.algorithm": "wordpiece",
            "tokenizer.vocab_size": "300",
            "tokenizer.train_documents": "7",
            "trainer.save_model": "false",
            "trainer.save_strategy": "no",
            "trainer.eval_strategy": "no",
            "trainer.log_grad_norm": "false",
        },
    ),
    ("biased", {"model.decoder_bias_init": "log_frequency"}),
    ("muonclip", {"optimizer.muon_config.clipping_qk_chunk_size": "7"}),
    ("unpacked", {"datacollator.pad_to_multiple_of": "8"}),
]
"""Base, and other values of its keys."""

BESIDE = {"tokenizer.train": ["tokenizer.path=null"]}
"""What another value needs beside it."""

_ROUNDS = "computes the same, and rounds elsewhere: "
_PROBED = "needs a file; test_probes.py trains with and without it"
_TUNING = "is of fine-tuning; test_finetune.py resumes with another value"

UNTRIED: dict[str, str] = {
    "trainer.output_dir": "every trial is in another folder",
    "trainer.resume_from_checkpoint": "every trial sets it",
    "trainer.per_device_train_batch_size": f"{_ROUNDS}sums are added by micro-batch",
    "trainer.mixed_precision": f"{_ROUNDS}bfloat16 or float32",
    "trainer.bf16_residual": f"{_ROUNDS}sums of the residual stream are bfloat16",
    "trainer.masked_logits_only_loss": f"{_ROUNDS}the matrix product with the vocabulary has other rows",
    "trainer.torch_compile": f"{_ROUNDS}compiled operations are fused; takes long",
    "trainer.use_cpu": f"{_ROUNDS}a GPU, where the machine has one",
    "trainer.cpu_threads": f"{_ROUNDS}a product is cut into other parts",
    "trainer.deterministic": "sets switches of the process; test_deterministic.py tries it in one of its own",
    "trainer.parallel": "does nothing in one process; test_parallel.py resumes with every value",
    "trainer.shard_size": "does nothing in one process; test_parallel.py tries it",
    "trainer.reshard_after_forward": "does nothing in one process; test_parallel.py tries it",
    "tokenizer.revision": "needs tokenizer.name, which is a tokenizer of the hub",
    "trainer.probe_sets": _PROBED,
    "trainer.probe_examples": _PROBED,
    "trainer.probe_seed": _PROBED,
    "wandb.enabled": "needs the package wandb; test_interval.py resumes with a stand-in",
    "dataset.force_redownload": _TUNING,
    "contrastive.pretrained_checkpoint_dir": _TUNING,
    "contrastive.pretrained_checkpoint": _TUNING,
    "contrastive.allow_random_weights": _TUNING,
    "finetune.model": "a run that is resumed has its weights from its checkpoint",
    "finetune.allow_random_weights": "a run that is resumed has its weights from its checkpoint",
    "finetune.initial_score": "a run that is resumed has its weights from its checkpoint",
    "finetune.seeds": "are several runs, each with a seed of its own",
    **dict.fromkeys((key for key in FIELDS if key.startswith("glue.")), "is of a suite, not of a run"),
}

COMPARED = ("step", "loss_hex", "lr", "num_tokens", "num_targets", "batch_digest")


def test_every_free_key_is_tried_or_has_a_reason() -> None:
    free = {key for key, field in FIELDS.items() if "free" in field.known.classes}
    tried = [key for _, changes in TRIED for key in changes]
    assert len(tried) == len(set(tried))
    assert set(tried).isdisjoint(UNTRIED)
    assert {*tried, *UNTRIED} == free


@pytest.fixture(scope="module")
def trunk(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base and its first four steps."""
    made: dict[str, Path] = {}

    def build(base: str) -> Path:
        if base not in made:
            made[base] = tmp_path_factory.mktemp(base) / "run"
            pretrain(tiny(made[base], *BASES[base], "trainer.max_steps=4", "scheduler.total_steps=12"))
        return made[base]

    return build


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(("base", "changes"), TRIED, ids=[next(iter(changes)) for _, changes in TRIED])
def test_a_free_key_changes_nothing_that_is_learned(
    tiny: Tiny, trunk: Callable[[str], Path], tmp_path: Path, base: str, changes: dict[str, str]
) -> None:
    def resume(name: str, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        out = tmp_path / name
        more = [f"{key}={changes[key]}" for key in keys] + [word for key in keys for word in BESIDE.get(key, ())]
        start = ["trainer.max_steps=7", "scheduler.total_steps=12", f"trainer.resume_from_checkpoint={trunk(base)}"]
        config = tiny(out, *BASES[base], *start, *more)
        for key in keys:
            assert FIELDS[key].value_in(config) != FIELDS[key].value_in(tiny(out, *BASES[base], *start)), key
        pretrain(config)
        return [tuple(step[field] for field in COMPARED) for step in log_lines(out, "step")]

    expected = resume("without", [])
    assert [step[0] for step in expected] == [5, 6, 7]
    if resume("together", list(changes)) != expected:
        pytest.fail(f"not free: {[key for key in changes if resume(key, [key]) != expected] or 'together'}")
