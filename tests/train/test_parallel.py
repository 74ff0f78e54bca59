"""Engines for several processes: losses, weights and optimizer state of one process, whatever keeps them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import fork, run_on, wait_for
from ports import free_port
from records import log_lines
from safetensors.torch import load_file

from neobert.cli import EXIT_CODES
from neobert.config.load import load_config
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train.loop import pretrain
from neobert.train.processes.parallel import choose_engine, choose_mesh_shape
from neobert.weights.folder import valid_steps

Tiny = Callable[..., Config]

ROWS = 12
"""Of a step: what 1, 2 and 3 processes share evenly."""


def build(tiny: Tiny, out: Path, world: int = 1, *more: str, accumulation: int = 1) -> Config:
    rows = ROWS // world // accumulation
    batch = [f"trainer.global_batch_size={ROWS}", f"trainer.per_device_train_batch_size={rows}"]
    length = ["trainer.max_steps=4", "trainer.save_steps=1", "trainer.eval_steps=2", "trainer.ema_decay=0.9"]
    return tiny(out, *length, *batch, *more)


def train_on(world: int, config: Config, folder: Path) -> None:
    if world == 1:
        assert pretrain(config).reason == "finished"
    else:
        run_on(world, lambda: EXIT_CODES[pretrain(config).reason], folder)


def check_same_run(one: Path, other: Path, *, after: int = 0, places: float = 1e-5) -> None:
    """Batches, losses, evaluations, and at the end weights and their average."""
    for kind, exact in (("step", ("num_tokens", "batch_digest")), ("eval", ("num_documents",)), ("eval_ema", ())):
        lines = [[x for x in log_lines(run, kind) if x["step"] > after] for run in (one, other)]
        assert len(lines[0]) > 0 or kind == "eval_ema"
        for a, b in zip(*lines, strict=True):
            for name in ("step", "num_targets", *exact):
                assert a[name] == b[name]
            assert a["loss"] == pytest.approx(b["loss"], abs=places)
    for name in ("model.safetensors", "ema.safetensors"):
        there = {(run / "checkpoints" / "4" / name).exists() for run in (one, other)}
        assert len(there) == 1
        if there == {False}:  # Without an average.
            continue
        weights = [load_file(run / "checkpoints" / "4" / name) for run in (one, other)]
        torch.testing.assert_close(*weights, atol=places, rtol=0)


@pytest.fixture(scope="module")
def one(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    train_on(1, build(tiny, out), out.parent)
    return out


def test_shards_equal_one_process_and_continue_on_others(tiny: Tiny, tmp_path: Path, one: Path) -> None:
    """From scratch on two processes; then 1 -> 2 -> 3 -> 1, each from the checkpoint of the one before."""
    two, other, three, again = (tmp_path / name for name in ("two", "other", "three", "again"))
    fsdp = "trainer.parallel=fsdp2"
    train_on(2, build(tiny, two, 2, fsdp, accumulation=3), tmp_path)
    check_same_run(one, two)
    sizes = [path.stat().st_size for path in sorted((two / "checkpoints/4/optimizer").iterdir())]
    assert len(sizes) == 2
    assert max(sizes) < 0.55 * sum(sizes), "each holds a half"
    train_on(2, build(tiny, other, 2, fsdp, f"trainer.resume_from_checkpoint={one}/checkpoints/1"), tmp_path)
    check_same_run(one, other, after=1)
    train_on(3, build(tiny, three, 3, fsdp, f"trainer.resume_from_checkpoint={other}/checkpoints/2"), tmp_path)
    check_same_run(one, three, after=2)
    train_on(1, build(tiny, again, 1, fsdp, f"trainer.resume_from_checkpoint={three}/checkpoints/3"), tmp_path)
    check_same_run(one, again, after=3)
    states = [torch.load(run / "checkpoints/4/optimizer.bin", weights_only=True)["state"] for run in (one, again)]
    torch.testing.assert_close(*states, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["stable_adamw", "normuon"])
def test_a_resume_on_the_same_shards_is_exact(tiny: Tiny, tmp_path: Path, optimizer: str) -> None:
    """With rows of one document, an optimizer that sums over shards, and a save that is written in the background."""
    sharded = ["trainer.parallel=fsdp2", "trainer.reshard_after_forward=false"]
    more = [f"optimizer.name={optimizer}", "datacollator.pack_sequences=false"]
    first, second, ddp = tmp_path / "first", tmp_path / "second", tmp_path / "ddp"
    train_on(2, build(tiny, first, 2, *sharded, *more, "trainer.async_save=true"), tmp_path)
    resume = f"trainer.resume_from_checkpoint={first}/checkpoints/2"
    train_on(2, build(tiny, second, 2, *sharded, *more, resume), tmp_path)
    for a, b in zip(log_lines(first, "step")[2:], log_lines(second, "step"), strict=True):
        assert (a["loss_hex"], a["grad_norm_hex"]) == (b["loss_hex"], b["grad_norm_hex"])
    for name in ("model.safetensors", "optimizer/shard-00001.safetensors"):
        assert (first / "checkpoints/4" / name).read_bytes() == (second / "checkpoints/4" / name).read_bytes()
    train_on(2, build(tiny, ddp, 2, *more, resume), tmp_path)
    check_same_run(first, ddp, after=2)


def test_a_rank_that_dies_while_it_saves_leaves_the_checkpoint_before(tiny: Tiny, tmp_path: Path) -> None:
    settings = ["trainer.parallel=fsdp2", "trainer.rank_timeout_seconds=2"]
    config, port = build(tiny, tmp_path / "run", 2, *settings), free_port()

    def work(rank: int) -> int:
        if rank == 1:
            os.environ["NEOBERT_FAULT"] = "commit.write.optimizer/shard-00001.safetensors@2"
        return EXIT_CODES[pretrain(config).reason]

    children = [
        fork(lambda rank=rank: work(rank), tmp_path / f"rank-{rank}", rank=rank, world=2, port=port) for rank in (0, 1)
    ]
    codes = [wait_for(child) for child in children]
    assert codes[1] == -9
    assert codes[0] > 0
    assert valid_steps(tmp_path / "run") == [1]


_CLIPPED = [
    "optimizer.name=muonclip",
    "optimizer.muon_config.clipping_interval=2",
    "optimizer.muon_config.clipping_threshold=0.02",
]
CASES: list[tuple[str, int, int, list[str]]] = [
    ("fsdp2", 3, 2, ["model.tie_word_embeddings=false", "model.decoder_bias=true", "trainer.z_loss=1e-4"]),
    ("fsdp2", 2, 1, ["trainer.gradient_checkpointing=true", "trainer.gradient_clipping=null", "trainer.skip_spikes=6"]),
    ("fsdp2", 2, 2, ["trainer.reshard_after_forward=false", "trainer.log_statistics=true", "optimizer.name=adam"]),
    ("fsdp2", 2, 1, ["trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"]),
    ("fsdp2", 2, 1, ["trainer.mixed_precision=bf16", "trainer.fp8=emulated"]),
    ("fsdp2", 2, 1, ["trainer.probe_steps=2", "trainer.objective=replaced_token"]),
    ("fsdp2", 3, 2, ["optimizer.name=normuon"]),
    ("fsdp2", 2, 1, _CLIPPED),
    ("fsdp2", 2, 1, ["model.ngpt=true", "optimizer.weight_decay=0", "trainer.ema_decay=null"]),
    ("hsdp", 4, 1, ["optimizer.name=normuon", "trainer.shard_size=2"]),
    ("hsdp", 4, 1, ["trainer.shard_size=2"]),
    ("hsdp", 2, 1, ["trainer.shard_size=1", "datacollator.pack_sequences=false"]),
    ("ddp", 3, 2, []),
    ("ddp", 2, 3, ["datacollator.pack_sequences=false", "optimizer.name=stable_adamw"]),
]


@pytest.mark.full
@pytest.mark.parametrize(("engine", "world", "accumulation", "more"), CASES)
def test_engines_equal_one_process(
    tiny: Tiny, tmp_path: Path, engine: str, world: int, accumulation: int, more: list[str]
) -> None:
    alone, several = tmp_path / "alone", tmp_path / "several"
    own = [word for word in more if "shard" not in word]
    config = build(tiny, several, world, f"trainer.parallel={engine}", *more, accumulation=accumulation)
    train_on(1, build(tiny, alone, 1, *own), tmp_path)
    train_on(world, config, tmp_path)
    check_same_run(alone, several, places=2e-2 if "trainer.mixed_precision=bf16" in more else 1e-5)
    assert (several / "checkpoints/4/optimizer").is_dir() == (engine != "ddp")


def load_small(*overrides: str) -> Config:
    return load_config(None, ["dataset.path=t", "tokenizer.path=t", "trainer.max_steps=1", *overrides])


@pytest.mark.parametrize(
    ("size", "machine", "shape"),
    [("2", "8", (4, 2)), ("8", "4", (1, 8)), ("null", "4", (2, 4)), ("null", None, (1, 8))],
)
def test_groups_of_a_hybrid(
    monkeypatch: pytest.MonkeyPatch, size: str, machine: str | None, shape: tuple[int, int]
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if machine is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", machine)
    config = load_small("trainer.parallel=hsdp", f"trainer.shard_size={size}")
    assert choose_mesh_shape(config, 8) == shape
    assert not choose_engine(config, 1).shards, "one process has everything"


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(StartupError, match=r"trainer.shard_size: 4 does not divide 6 .*trainer.parallel: fsdp2"):
        choose_engine(load_small("trainer.parallel=hsdp", "trainer.shard_size=4"), 6)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["trainer.bf16_residual=true"], "trainer.bf16_residual: true"),
        (["wandb.enabled=true", "wandb.watch=gradients"], "wandb.watch: gradients"),
    ],
)
def test_what_shards_cannot_do_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(Exception, match=rf"{named} .*trainer.parallel: fsdp2.*write trainer.parallel: ddp, or"):
        load_small("trainer.parallel=fsdp2", *overrides)
