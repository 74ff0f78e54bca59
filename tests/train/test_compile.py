"""Compiled blocks in a whole run: one graph a kind of layer and mode, none for other documents or the last batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from neobert.config.schema import Config
from neobert.train import setup as opening
from neobert.train.loop import pretrain


@pytest.mark.parametrize(
    ("extra", "num_graphs"),
    [
        ((), 2),
        (("model.local_attention=8", "model.global_attention_every=2"), 4),
        (("trainer.gradient_checkpointing=true",), 2),
        (("optimizer.name=muonclip", "optimizer.muon_config.clipping_interval=2"), 2),
        (("model.ngpt=true", "optimizer.weight_decay=0"), 2),
        (("trainer.ema_decay=0.9",), 2),
        (
            (
                "trainer.global_batch_size=12",
                "trainer.batch_size_warmup_start=4",
                "trainer.batch_size_warmup_steps=5",
                "datacollator.mlm_probability_final=0.1",
                "datacollator.mask_units=spans",
            ),
            2,
        ),
    ],
    ids=[
        "plain",
        "windows",
        "checkpointing",
        "measured logits",
        "normalised",
        "averaged weights",
        "growing batch, falling fraction of masks",
    ],
)
def test_zero_recompiles_after_the_first_step_and_evaluation(
    tiny: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: tuple[str, ...],
    num_graphs: int,
) -> None:
    """Blocks compile once to train and once to evaluate, in batches of another size whose last one is not full."""
    compile_keys = ("trainer.torch_compile=true", "trainer.torch_compile_backend=eager")
    graphs = []
    # It compiles a block of its own.
    monkeypatch.setattr(opening, "check_compiled_gradients", lambda *given: [])
    for steps in (1, 7):
        torch._dynamo.reset()
        counters.clear()
        keys = (*compile_keys, *extra, f"trainer.max_steps={steps}", "trainer.per_device_eval_batch_size=3")
        pretrain(tiny(tmp_path / str(steps), *keys, "trainer.eval_steps=2", "model.num_hidden_layers=3"))
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
        assert not counters["unimplemented"]
    assert graphs == [num_graphs, num_graphs]
    weights = load_file(tmp_path / "7" / "checkpoints" / "7" / "model.safetensors")
    assert "encoder.layers.2.qkv.weight" in weights
    assert not [name for name in weights if "_orig_mod" in name]
