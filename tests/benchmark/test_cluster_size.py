"""What a run would need of GPUs, computed on fake tensors."""

import json
from dataclasses import replace

import pytest

from neobert.benchmark.cluster_size import PARALLEL, Cluster, CountedModel, choose_size, count_model, size_config
from neobert.commands.cluster_commands import GPU_NAMES
from neobert.commands.registry import run_command
from neobert.config.load import load_config
from neobert.errors import StartupError
from neobert.model.peak import GPUS, PEAKS

SMALL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=96",
    "trainer.global_batch_size=96",
    "trainer.per_device_train_batch_size=1",
]


@pytest.fixture(scope="module")
def counted() -> dict[str, CountedModel]:
    found = {}
    for name, more in {
        "plain": [],
        "other": ["trainer.gradient_checkpointing=true", "trainer.ema_decay=0.999", "optimizer.name=normuon"],
    }.items():
        found[name] = count_model(load_config("neobert_paper_1024", [*SMALL, *more]), 1000)
    return found


def test_what_is_counted(counted: dict[str, CountedModel]) -> None:
    plain = counted["plain"]
    hidden, ffn, vocabulary = 64, 64, 1024
    blocks = 2 * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden)
    assert plain.weights == blocks + 2 * vocabulary * hidden + hidden
    assert plain.root_weights == 2 * vocabulary * hidden + hidden
    assert plain.optimizer_bytes - 8 * plain.weights < 4 * 100, "two moments in fp32, and a count of steps a weight"
    assert plain.optimizer_flops == 0
    other = counted["other"]
    assert other.optimizer_flops > 0, "products of Muon"
    assert other.optimizer_bytes < plain.optimizer_bytes, "one moment of the matrices"
    assert other.saved_bytes_per_slot < plain.saved_bytes_per_slot / 2
    assert other.block_flops == pytest.approx(plain.block_flops * 4 / 3)
    assert plain.slots == 1_000_000 * 96 * 1024


def test_sharded_weights_leave_room(counted: dict[str, CountedModel]) -> None:
    model = replace(counted["other"], weights=5_000_000_000, optimizer_bytes=40_000_000_000)
    cluster = Cluster(gpu="H100", num_gpus=32)
    sizes = {name: choose_size(model, cluster, name, 96) for name in PARALLEL}
    assert sizes["ddp"].micro_batch_rows == 0, "16 bytes a weight are 80 GB"
    assert sizes["fsdp2"].micro_batch_rows == 3
    for name in ("weights", "gradients", "optimizer", "average"):
        assert getattr(sizes["fsdp2"], name) == pytest.approx(getattr(sizes["hsdp"], name) / 4)
    assert sizes["hsdp"].total < sizes["ddp"].total


def test_more_gpus_are_faster_and_cost_no_less(counted: dict[str, CountedModel]) -> None:
    model = replace(counted["plain"], launches=0, block_flops=1e10, weights=100_000_000)  # Large enough to be busy.
    found = [choose_size(model, Cluster(gpu="H100", num_gpus=n), "ddp", 96) for n in (1, 8, 32)]
    assert found[0].slots_per_second < found[1].slots_per_second < found[2].slots_per_second
    hours = [size.gpu_hours or 0 for size in found]
    assert hours == sorted(hours)
    assert [size.micro_batch_rows * size.accumulation * size.num_gpus for size in found] == [96] * 3


def test_what_cannot_be_sized() -> None:
    config = load_config("neobert_paper_1024", SMALL)
    with pytest.raises(StartupError, match=r"trainer\.global_batch_size: 96 cannot be shared .* 7 GPUs; write 98"):
        size_config(config, Cluster(gpu="H100", num_gpus=7), "ddp", 1000)
    with pytest.raises(StartupError, match=r"model\.vocab_size: null .* --vocab-size"):
        size_config(config, Cluster(gpu="H100", num_gpus=8), "ddp", None)


def run_size(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        run_command("size", program="neobert size", argv=argv)
    return ended.value.code or 0


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(sorted(GPUS)) == tuple(sorted(GPU_NAMES))
    assert all(gpu.name in PEAKS for gpu in GPUS.values())
    argv = ["neobert_paper_1024", *SMALL, "--gpus", "16", "--gpu", "H200", "--vocab-size", "1000"]
    assert run_size([*argv, "--parallel", "hsdp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["computed"] is True
    assert [(size["parallel"], size["num_gpus"]) for size in found["sizes"]] == [("hsdp", 16)]
    assert run_size(argv[:-2]) == 2
    assert "--vocab-size" in capsys.readouterr().err
