"""Verifying exported folders without a process that imports transformers first."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from children import run_forked

from neobert.export import verify


def _leave_the_package() -> None:
    """What a process has that imports transformers and nothing of this package."""
    import transformers.dynamic_module_utils as dynamic_modules

    for name in [x for x in sys.modules if x.split(".")[0] in ("neobert", "transformers_modules")]:
        del sys.modules[name]
    sys.modules["neobert"] = None  # type: ignore[assignment]  # To import it is an error.
    sys.path[:] = [x for x in sys.path if not (Path(x) / "transformers_modules").is_dir()]
    dynamic_modules.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]


@contextmanager
def forked_probes() -> Iterator[None]:
    """In here exported folders are verified by a fork of this process. That a process of its own does it, which imports
    transformers first, is seen where all variants are verified (`export/test_verify_exports.py`)."""

    def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        return run_forked(command, before=_leave_the_package, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
        yield
