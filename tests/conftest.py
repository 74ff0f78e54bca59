"""A small corpus, a small tokenizer and a small config, made on the spot: no test needs a network or a data folder."""

import gc
import gzip
import json
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from devices import DEVICE, KEYS
from small_corpus import make_texts

if TYPE_CHECKING:
    from neobert.config.schema import Config

MOST_WORKERS = 8
"""Each takes a gigabyte, and on more cores the longest test decides."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Commands ignore a signal that they were started to ignore. Tests send it, however pytest was started (`nohup pytest`).
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored where pytest was started in the background.
# Models of a few thousand weights are faster on one core, and other work on the machine does not stall them. Child
# processes inherit it: a resumed run is compared with one of this process bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# Read when triton is imported, as it is with this package and some builds of torch: without a GPU its kernels run in
# the interpreter. The conftest of a chosen folder imports it before any hook is called.
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))):
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Sets up torch where tests run. The process that hands them out imports nothing: its workers wait for it."""
    if config.getoption("dist", "no") != "no" and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # A GPU that this build of torch does not use.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests are millions of objects that stay: looking through them for garbage takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that split the tests; 0 is this one alone.

    Each imports torch first, which takes longer than most files of tests: those that are chosen by name run here.
    """
    chosen = config.option.keyword or all("::" in word or word.endswith(".py") for word in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if chosen or cores == 1 else min(MOST_WORKERS, cores)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What earlier runs of this user found out, and keep, is not known to a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Processes are killed here, and machines never: what was written is there without a flush, which takes a run as
    long as its training. A descriptor that is not open is an error still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_stacks_of_seeds() -> Iterator[None]:
    """`torch.manual_seed`, called in every step, writes down the stack for each kind of device that is not there, which
    takes as long as a layer."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for module in (torch.cuda, torch.xpu, torch.mtia):
            if not module.is_available():
                patch.setattr(module, "traceback", SimpleNamespace(format_stack=list))
        yield


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(240)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A folder with two training files (one of them .gz)."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "part-0.jsonl").write_text("".join(lines[:150]))
    with gzip.open(folder / "part-1.jsonl.gz", "wt") as handle:
        handle.writelines(lines[150:])
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    from neobert.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(texts), algorithm="byte_bpe", vocab_size=360).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path, tokenizer_folder: Path) -> "Callable[..., Config]":
    """Builds the config of a run that takes a second: `tiny(output_dir, "trainer.max_steps=3", ...)`."""
    from neobert.config.load import config_to_yaml, load_config, parse_config

    base = [
        "seed=3",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.intermediate_size=48",
        "model.max_position_embeddings=64",
        f"dataset.path={corpus}",
        "dataset.max_seq_length=64",
        "dataset.eval_samples=12",
        "dataset.num_lanes=2",
        "dataset.window_documents=32",
        f"tokenizer.path={tokenizer_folder}",
        "optimizer.lr=1e-2",
        "scheduler.warmup_steps=2",
        "trainer.max_steps=12",
        "trainer.per_device_train_batch_size=4",
        "trainer.per_device_eval_batch_size=4",
        "trainer.mixed_precision=no",
        "trainer.logging_steps=3",
        "trainer.eval_steps=4",
        "trainer.save_steps=4",
        "trainer.save_total_limit=null",
        *KEYS[DEVICE],
        "trainer.output_dir=outputs/tiny",
    ]
    text = config_to_yaml(load_config(None, base))

    def build(output_dir: Path, *overrides: str) -> "Config":
        return parse_config(text, [f"trainer.output_dir={output_dir}", *overrides])

    return build


@pytest.fixture(scope="session")
def whole_run(tiny: "Callable[..., Config]", tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`whole_run("trainer.max_steps=3", ...)`: the folder of such a run that nothing interrupted, made once. It is
    compared with, and never changed."""
    from neobert.train.loop import pretrain

    folder, made = tmp_path_factory.mktemp("whole"), dict[tuple[str, ...], Path]()

    def find(*overrides: str) -> Path:
        if overrides not in made:
            out = folder / str(len(made))
            pretrain(tiny(out, *overrides))
            made[overrides] = out
        return made[overrides]

    return find


@pytest.fixture(scope="session")
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers copies the code of folders into a cache; not into the user's."""
    import transformers.dynamic_module_utils as dynamic_modules

    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
    patch.undo()
