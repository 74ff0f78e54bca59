"""Runs of every variant, exported once and verified in one process: starting transformers takes longer than a test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers.dynamic_module_utils as dynamic_modules

from neobert.config.schema import Config
from neobert.export.verify import Verdict, verify
from neobert.export.write import Exported, ExportRequest, export
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]

RUNS = {
    "tied": [],
    "untied": ["model.tie_word_embeddings=false"],
    "learned": ["model.rope=false"],
    "gelu_layernorm": ["model.rms_norm=false", "model.hidden_act=gelu"],
}
EXPORTS = {
    "native": ("tied", "auto", "fp32"),
    "native_untied": ("untied", "native", "fp32"),
    "native_bf16": ("tied", "auto", "bf16"),
    "learned": ("learned", "auto", "fp32"),
    "gelu_layernorm": ("gelu_layernorm", "auto", "fp32"),
    "remote": ("tied", "remote_code", "fp32"),
    "remote_untied": ("untied", "remote_code", "bf16"),
}
"""Name of the folder: run, --format, --dtype."""


@pytest.fixture(scope="session", autouse=True)
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Transformers copies the code of folders into a cache; not into the user's."""
    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


@pytest.fixture(scope="session")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small trained models with weights large enough to make outputs differ."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ["trainer.max_steps=8", "trainer.save_steps=0", "trainer.eval_steps=0"]
    settings += ["model.embedding_init_range=0.3", "model.decoder_init_range=0.3"]
    for name, more in RUNS.items():
        pretrain(tiny(folder / name, *settings, *more))
    return {name: folder / name for name in RUNS}


@pytest.fixture(scope="session")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exports")
    return {
        name: export(ExportRequest(source=str(runs[run]), output=folder / name, form=form, dtype=dtype))
        for name, (run, form, dtype) in EXPORTS.items()
    }


@pytest.fixture(scope="session")
def broken(runs: dict[str, Path], exports: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the native folder with one thing wrong."""
    from damage import DAMAGES

    folder = tmp_path_factory.mktemp("broken")
    return [damage(exports["native"].folder, folder / name) for name, damage in DAMAGES.items()]


@pytest.fixture(scope="session")
def verdicts(runs: dict[str, Path], exports: dict[str, Exported], broken: list[Path]) -> dict[str, Verdict]:
    """Of every export and of every broken folder, against the run it was made from."""
    pairs = [(done.folder, str(runs[EXPORTS[name][0]])) for name, done in exports.items()]
    pairs += [(folder, str(runs["tied"])) for folder in broken]
    return {Path(verdict.folder).name: verdict for verdict in verify(pairs)}
