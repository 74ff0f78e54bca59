"""What docs/extending.md says of its walks, checked by a process that imports the package with all of them.

`python extended.py FOLDER` writes `failures.json`: the tracebacks by check.
"""

import json
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from small_corpus import make_texts

import neobert
from neobert.config.fields import FIELDS
from neobert.config.load import ConfigError
from neobert.config.reference import build_help
from neobert.config.schema import Config
from neobert.config.schema_data import DatasetSection
from neobert.data.source.files import kind_of_name
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import describe_sources
from neobert.model.attention import ATTENTION
from neobert.model.segments import Segments
from neobert.optim.optimizers import OPTIMIZERS, build_optimizer, step_unless
from neobert.train.record.trackers import WandbSink

FOLDER = Path(sys.argv[1])
TINY = [
    f"dataset.path={FOLDER}/train.ft",
    "dataset.eval_samples=8",
    "dataset.max_seq_length=32",
    "tokenizer.train=true",
    "tokenizer.vocab_size=300",
    "tokenizer.train_documents=40",
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=24",
    "scheduler.warmup_steps=0",
    "trainer.max_steps=4",
    "trainer.use_cpu=true",
    "trainer.torch_compile=false",
    "trainer.per_device_train_batch_size=2",
    "trainer.mixed_precision=no",
]


def build_config(*overrides: str) -> Config:
    return neobert.load_config(None, [*TINY, *overrides])


def refused(*overrides: str) -> str:
    """The error of a config."""
    try:
        build_config(*overrides)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{overrides} was accepted")


def train(name: str, *overrides: str) -> tuple[list[float], dict[str, Any]]:
    """The losses of a run, and its last evaluation."""
    neobert.pretrain(build_config(f"trainer.output_dir={FOLDER / name}", *overrides))
    return read_log(name)


def read_log(name: str) -> tuple[list[float], dict[str, Any]]:
    """What a run that was made wrote: its losses, and its last evaluation."""
    lines = [json.loads(line) for line in (FOLDER / name / "log.jsonl").read_text().splitlines()]
    losses = [float.fromhex(line["loss_hex"]) for line in lines if line["kind"] == "step"]
    return losses, next(line for line in reversed(lines) if line["kind"] == "eval")


def check_format() -> None:
    texts = make_texts(60)
    path = FOLDER / "train.ft"
    path.write_text("".join(f"__label__a __label__b {text}\n" for text in texts) + "__label__a\n")
    assert [kind_of_name(name) for name in ("A.FT", "a.ft.gz", "a.bin")] == ["fastText", "fastText", None]
    (spec,) = describe_sources(DatasetSection(path=str(path)))
    source: Any = list_splits(spec)["train"](None)
    assert [record.text for record in source.records()] == [*texts, None]
    train("plain")
    assert "labels are left out" in (FOLDER / "plain" / "training.log").read_text()


def check_optimizer() -> None:
    adamw, _ = read_log("plain")
    keys = ("optimizer.name=lion", "optimizer.lr=1e-2", "trainer.save_steps=2")
    lion, _ = train("lion", *keys)
    assert (len(lion), lion[0]) == (4, adamw[0])
    assert all(a != b for a, b in zip(lion[1:], adamw[1:]))
    resumed, _ = train("resumed", *keys, f"trainer.resume_from_checkpoint={FOLDER}/lion/checkpoints/2")
    assert resumed == lion[2:]
    assert "optimizer.eps" in refused("optimizer.name=lion", "optimizer.eps=1e-6")
    module = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(module, build_config("optimizer.name=lion").optimizer)
    for skip in (False, True, False):
        before = [p.detach().clone() for p in module.parameters()]
        for p in module.parameters():
            p.grad = torch.full_like(p, float("nan") if skip else 1.0)
        step_unless(optimizer, torch.tensor(skip))
        assert [torch.equal(a, b) for a, b in zip(before, module.parameters())] == [skip, skip]
        assert all(state["mean"].isfinite().all() for state in optimizer.state.values())
    assert set(OPTIMIZERS) == set(FIELDS["optimizer.name"].choices)


def check_attention() -> None:
    borders = torch.tensor([0, 5, 9, 16, 16], dtype=torch.int32)
    ids = torch.tensor([[1] * 5 + [2] * 4 + [0] * 7], dtype=torch.int32)
    segments = Segments(ids=ids, cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=16)
    real = 9
    for window, causal in ((None, False), (4, False), (None, True), (4, True)):
        segments, results = replace(segments, causal=causal), []
        for name in ("masked", "sdpa"):
            qkv = torch.randn(3, 16, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            backend = ATTENTION[name]
            out = backend.attend(*qkv, backend.prepare(segments, window), scale=0.3)[:real]
            (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
            results.append((out.detach(), gradient[:, :real]))
        torch.testing.assert_close(*results)
    sdpa, _ = read_log("plain")
    masked, _ = train("masked", "model.attn_backend=masked")
    torch.testing.assert_close(torch.tensor(masked), torch.tensor(sdpa))


def check_objective() -> None:
    keys = ("datacollator.mask_fraction=0.7", "trainer.z_loss=1e-4")
    assert all(word.split("=")[0] in refused(*keys, "trainer.objective=replaced_token") for word in keys)
    _, masked = read_log("plain")
    losses, every = train("all", "trainer.objective=all_tokens", "optimizer.lr=1e-2", *keys)
    assert losses[-1] < losses[0]
    assert every["num_targets"] > 4 * masked["num_targets"]
    model = neobert.load(FOLDER / "all")
    assert len(model.fill_mask(["the [MASK] sees a red door."])[0].masks[0]) == 5


def check_key() -> None:
    field = FIELDS["wandb.notes"]
    assert (field.default, field.known.resume) == (None, "free")
    assert "wandb.notes" in build_help("usage", "")
    assert "wandb.enabled" in refused("wandb.notes=longer")
    begun: dict[str, Any] = {}
    fake: Any = SimpleNamespace(init=lambda **values: begun.update(values) or SimpleNamespace(id="1"))
    sys.modules["wandb"] = fake
    config = build_config("wandb.enabled=true", "wandb.notes=longer", f"wandb.dir={FOLDER}")
    PartialState()  # As in a run: accelerate's trackers log with it.
    WandbSink(config, FOLDER, torch.nn.Linear(1, 1)).begin(0)
    assert begun["notes"] == "longer"


def check_command() -> None:
    def call(*words: str) -> str:
        return subprocess.run([sys.executable, "-m", "neobert", *words], capture_output=True, text=True).stdout

    assert "find-key" in call("--help")
    assert call("find-key", "--help").startswith("usage: neobert find-key")
    assert "scheduler.warmup_steps: " in call("find-key", "warmup")


# The format first: the others read its file, and compare with its run.
CHECKS = [check_format, check_optimizer, check_attention, check_objective, check_key, check_command]

if __name__ == "__main__":
    torch.set_num_threads(1)
    failures: dict[str, str] = {}
    for check in CHECKS:
        try:
            check()
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    (FOLDER / "failures.json").write_text(json.dumps({"failures": failures, "source": neobert.__file__}))
