"""Code that restores a run, orders its rows or says what may change, with one mistake each: the tests must notice.

A mutant is a text of the package that occurs once, what it becomes, and the tests that fail then. They run on a copy,
in a fork of this process, which has the libraries and no module of the package itself imported.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    text: str
    becomes: str
    tests: tuple[str, ...]
    """Below `tests/`."""


ORDER = ("data/test_order.py",)
PACKING = ("data/test_packing.py",)
LANES = ("data/test_lanes.py",)
STREAMS = ("data/test_lanes.py", "data/test_streams.py", "data/test_elasticity.py")
MIXTURE = ("data/test_mixture.py",)
LOADER = ("data/test_loader.py", "data/test_elasticity.py", "data/test_skip_rows.py", "data/test_batch_size.py")
COLLATE = ("data/test_collate.py",)
IDENTITY = ("train/test_identity.py",)
RESUME = ("train/test_resume.py", "train/test_identity.py")
AVERAGE = ("train/test_moving_average.py",)
COMMIT = ("train/test_commit.py",)
NUMERICS = ("train/test_numerics.py",)

MUTANTS = {
    "a key without the constant": Mutant("value + number + GAMMA", "value + number", ORDER),
    "a permutation of fewer rounds": Mutant("    _ROUNDS = 4\n", "    _ROUNDS = 3\n", ORDER),
    "all ranks drop the same": Mutant('key(seed, "step", step, rank)', 'key(seed, "step", step, 0)', ORDER),
    "a piece of the shortest length is lost": Mutant(
        "sizes >= max(1, min_length)", "sizes > max(1, min_length)", PACKING
    ),
    "rows of any number of segments": Mutant("if free and len(row) < max_items:", "if free:", PACKING),
    "every window is the first": Mutant(
        'state["window"] + 1,\n            "row"', 'state["window"],\n            "row"', LANES
    ),
    "windows of an epoch are counted on": Mutant('"epoch": epoch + 1, "window": 0,', '"epoch": epoch + 1,', LANES),
    "all lanes shuffle alike": Mutant('"rows", self._lane, epoch', '"rows", 0, epoch', LANES),
    "epochs in the same order": Mutant(
        'self.first, key(seed, "documents", epoch)', 'self.first, key(seed, "documents", 0)', STREAMS
    ),
    "a large document resumes with its first tokens": Mutant("starts[:1] = done", "starts[:1] = 0", STREAMS),
    "a long text starts again": Mutant('"char": reading.char,', '"char": 0,', STREAMS),
    "a bad shard is read again": Mutant(
        '"skipped_shards": reading.skipped_shards,', '"skipped_shards": state["skipped_shards"],', STREAMS
    ),
    "what a mixture owes is forgotten": Mutant('"owed": owed,', '"owed": [0] * len(owed),', MIXTURE),
    "a mixture draws the same in all lanes": Mutant('"mixture", self.lane, state', '"mixture", 0, state', MIXTURE),
    "rows begin at 0": Mutant('0 if state is None else state["next_row"]', "0", LOADER),
    "skipped rows count": Mutant("end += stop - max(start, first)", "end += 0", LOADER),
    "a row is given twice": Mutant('{**state, "row": row + 1}', '{**state, "row": row}', LOADER),
    "a state of another order": Mutant("if state.get(name) != value", "if False", LOADER),
    "lanes that ranks read differently": Mutant(
        "setdefault(lane, lane_state) != lane_state:", "setdefault(lane, lane_state) is None:", LOADER
    ),
    "the digest of one rank": Mutant("sum(int(digest, 16) for digest in digests)", "int(digests[0], 16)", LOADER),
    "ranks take single rows of a micro-batch": Mutant("(row // self._unit) %", "row %", LOADER),
    "the first batch is that of step 0": Mutant("_merge(skip), step\n", "_merge(skip), 0\n", LOADER),
    "no digest to expect": Mutant('"next_batch_digest": digest}', '"next_batch_digest": None}', LOADER),
    "a digest without segments": Mutant(
        "corrupted.astype(np.uint64) | (numbers << np.uint64(24))", "corrupted.astype(np.uint64)", COLLATE
    ),
    "masks of evaluation follow the row": Mutant(
        "np.repeat(firsts, layout.lengths) + layout.positions", "layout.slots", COLLATE
    ),
    "other documents are the same data": Mutant("return not fits(saved, now)", "return False", IDENTITY),
    "any first batch will do": Mutant(
        "saved is not None and int(saved, 16) != found % 2**64", "saved is not None and found is None", IDENTITY
    ),
    "what must be declared need not be": Mutant(
        'if d.kind in ("fixed", "needs declaring"))', 'if d.kind == "fixed")', IDENTITY
    ),
    "the config's optimizer settings hold": Mutant(
        "for key, value in group.items() if key",
        'for key, value in {**group, "weight_decay": saved["param_groups"][0]["weight_decay"]}.items() if key',
        IDENTITY,
    ),
    "micro-batches may differ": Mutant("(same_ranks or not next_fit)", "True", IDENTITY),
    "the average starts again": Mutant(
        "average.begin(step, _load_tensors(checkpoint / EMA_FILE) if had else None)",
        "average.begin(step, None)",
        AVERAGE,
    ),
    "later steps stay": Mutant("if later > step:", "if later > step + 4:", RESUME),
    "files of two checkpoints": Mutant(
        'if found != saved["step"]:', "if found is None:", ("train/test_checkpoint_security.py",)
    ),
    "the manifest of one rank": Mutant(
        "for written in every for name, record in written.files.items()",
        "for name, record in every[0].files.items()",
        COMMIT,
    ),
    "a background save reads what training changes": Mutant('to("cpu", copy=True)', "cpu()", COMMIT),
    "earlier skips are forgotten": Mutant("skip_rows=[*state.skip_rows, rows]", "skip_rows=[rows]", NUMERICS),
    "back to a checkpoint that is too new": Mutant("x <= state.step - distance", "x <= state.step", NUMERICS),
}


def files_with(text: str) -> list[Path]:
    """The file of the package that holds a text, once for each time."""
    return [path for path in (ROOT / "neobert").rglob("*.py") for _ in range(path.read_text().count(text))]


LIBRARIES = ("accelerate", "datasets", "pyarrow.parquet", "torch._dynamo", "torch.distributed.tensor", "transformers")


@pytest.fixture(scope="module")
def libraries() -> None:
    """What takes longer to import than most of the tests take."""
    for name in LIBRARIES:
        importlib.import_module(name)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and output of the tests on the copy of the package in `folder`, up to the first that fails."""
    from children import fork, wait_for  # It imports accelerate.

    def work() -> int:
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(f"{ROOT}/"):
                del sys.modules[name]
        sys.path[:] = [str(folder), *(path for path in sys.path if not Path(path or ".").is_relative_to(ROOT))]
        for name in [name for name in os.environ if name.startswith("PYTEST_")]:
            del os.environ[name]
        os.environ["PYTHONPATH"] = str(folder)
        os.chdir(folder)
        arguments = ["-x", "-n", "0", "-p", "no:cacheprovider", "--durations=0"]
        return int(pytest.main([*arguments, *(f"tests/{name}" for name in tests)]))

    code = wait_for(fork(work, folder / "printed"), 1800)
    return code, (folder / "printed").read_text()


@pytest.fixture
def copy(libraries: None, tmp_path: Path) -> Path:
    for name in ("neobert", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("scripts", "configs", "docs", "README.md", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("name", MUTANTS)
def test_the_text_of_a_mutant_is_there_once(name: str) -> None:
    assert len(files_with(MUTANTS[name].text)) == 1, f"write the mutant {name!r} again for the code as it is now"


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, copy: Path) -> None:
    mutant = MUTANTS[name]
    (file,) = files_with(mutant.text)
    changed = copy / file.relative_to(ROOT)
    changed.write_text(changed.read_text().replace(mutant.text, mutant.becomes))
    code, printed = run_tests(copy, mutant.tests)
    assert code == pytest.ExitCode.TESTS_FAILED, printed
    assert "\nFAILED tests/" in printed, "a test that fails, not one that cannot run"


@pytest.mark.full
@pytest.mark.parametrize("name", sorted({name for mutant in MUTANTS.values() for name in mutant.tests}))
def test_a_copy_without_a_mistake_passes(copy: Path, name: str) -> None:
    code, printed = run_tests(copy, (name,))
    assert code == pytest.ExitCode.OK, printed
