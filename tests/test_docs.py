"""Every command and every Python block of README.md and docs/ runs, in order, with a small model and a small corpus."""

import ast
import asyncio
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from sysconfig import get_path
from urllib.request import Request, urlopen

import pytest
from children import fork, kill, run_in_two, wait_for, wait_until
from ports import free_port
from probes import forked_probes
from small_corpus import make_texts
from torch.distributed.run import parse_args

import neobert.config.load as config_load
from neobert.commands import staged_run as pipeline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FORK = multiprocessing.get_context("fork")
# Run by the gate itself and by every newcomer: they make an environment and call this suite.
ENVIRONMENT = ("[ -n ", "pip install", "pytest")
TINY = [
    "--dataset.path",
    "my_text.jsonl",
    "--dataset.eval_samples",
    "8",
    "--dataset.max_seq_length",
    "32",
    "--dataset.config",
    "null",
    "--tokenizer.name",
    "null",
    "--tokenizer.path",
    "null",
    "--tokenizer.train",
    "true",
    "--tokenizer.vocab_size",
    "300",
    "--tokenizer.train_documents",
    "40",
    "--model.hidden_size",
    "16",
    "--model.num_hidden_layers",
    "1",
    "--model.num_attention_heads",
    "2",
    "--model.intermediate_size",
    "24",
    "--trainer.max_steps",
    "2",
    "--trainer.use_cpu",
    "true",
    "--trainer.torch_compile",
    "false",
]
TOKENIZER_KEYS = [key for key in TINY if key.startswith("--tokenizer.")]


def commands_of(page: Path) -> list[str]:
    """Those that are not run by the gate itself."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(ENVIRONMENT)]


def names_in(line: str) -> set[str]:
    """Of what a command reads or writes: `mine` for `tokenizers/mine`, `outputs/mine/config.yaml` and `mine.yaml`."""
    words = [word.split("/") for word in shlex.split(line)]
    made = {parts[1] for parts in words if parts[0] in ("outputs", "tokenizers", "tokenized_data") and len(parts) > 1}
    return (made | {parts[-1].removesuffix(".yaml") for parts in words if parts[-1].endswith(".yaml")}) - {"quickstart"}


def chains_of(page: Path) -> list[list[str]]:
    """The commands of a page, in order, in groups that have no name in common: each runs without the others."""
    chains: list[tuple[set[str], list[str]]] = []
    for line in commands_of(page):
        names = names_in(line)
        joined = [chain for chain in chains if chain[0] & names]
        chains = [chain for chain in chains if chain not in joined]
        chains.append((names.union(*(c[0] for c in joined)), [*(x for c in joined for x in c[1]), line]))
    return [lines for _, lines in chains]


SERVED = {"serving.md": "my_embedder", "tutorial.md": "tutorial-embedder"}
"""Pages whose last two commands start a server and ask it, and the name of the model."""

FIRST = commands_of(ROOT / "README.md")[0]
CHAINS = [
    pytest.param(lines, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name not in SERVED
    for number, lines in enumerate(chains_of(page), 1)
]


def make_clone(folder: Path) -> Path:
    """A folder that looks like a clone, with a text of the user's own."""
    folder.mkdir()
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    lines = [json.dumps({"text": text}) + "\n" for text in make_texts(120)]
    (folder / "my_text.jsonl").write_text("".join(lines))
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "train.jsonl").write_text("".join(lines[:100]))
    (folder / "my_texts" / "validation.jsonl").write_text("".join(lines[100:]))
    pairs = [{"anchor": text, "positive": text[::-1]} for text in make_texts(120, seed=1)]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = re.search(
        r"^```yaml\n(task: contrastive.*?)^```", (ROOT / "docs" / "contrastive.md").read_text(), re.S | re.M
    )
    assert recipe is not None
    assert recipe[1].count("\n") == 10, "ten lines"
    (folder / "my_embedder.yaml").write_text(recipe[1])
    rows = [{"text": text, "label": "even" if len(text) % 2 else "odd"} for text in make_texts(80, seed=2)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = re.search(r"^```yaml\n(task: finetune.*?)^```", (ROOT / "docs" / "finetuning.md").read_text(), re.S | re.M)
    assert recipe is not None
    assert recipe[1].count("\n") == 10, "ten lines"
    (folder / "my_classifier.yaml").write_text(recipe[1])
    for task, columns in {"sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"]}.items():
        (folder / "my_glue" / task).mkdir(parents=True)
        rows = [{**dict.fromkeys(columns, text), "label": number % 2} for number, text in enumerate(make_texts(8))]
        for split in ("train", "validation"):
            file = folder / "my_glue" / task / f"{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "OLD.yaml").write_text(
        "dataset: {name: x}\ntokenizer: {name: y}\ntrainer: {max_steps: 5, train_batch_size: 4}\n"
    )
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return make_clone(tmp_path / "clone")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`outputs/quickstart`, which the first command of the README makes: readers of the other commands have it."""
    folder = make_clone(tmp_path_factory.mktemp("first") / "clone")
    with pytest.MonkeyPatch.context() as patch:
        run(FIRST, folder, patch)
    return folder / "outputs" / "quickstart"


def tiny_overrides(words: list[str]) -> list[str]:
    """`TINY`, which wins over a command's own words; but tokenised data, its tokenizer, and the budget of a run that is
    only prepared or profiled stay those of the command."""
    own = [key for key in TOKENIZER_KEYS if "--tokenizer.path" in words]
    own += ["--dataset.path"] if any(word.startswith("tokenized_data/") for word in words) else []
    keeps_budget = {"--prepare-only", "--trainer.profiler_steps", "scripts/pipeline.py"} & {*words}
    own += ["--trainer.max_steps"] if keeps_budget else []
    pairs = dict(zip(TINY[::2], TINY[1::2]))
    if "--dataset.mixture" in words:  # Continues from a run of two steps.
        own.append("--dataset.path")
        pairs["--trainer.max_steps"] = "4"
    if "--trainer.resume_from_checkpoint" in words and any("outputs/trunk" in word for word in words):
        pairs["--trainer.max_steps"] = "4"
    return [word for key, value in pairs.items() if key not in own for word in (key, value)]


def run(line: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    target = None
    if ">" in words:
        words, target = words[: words.index(">")], words[-1]
    if "contrastive/finetune.py" in line and words[0] == "python":
        steps = "4" if "latest" in words else "2"
        words += ["--trainer.max_steps", steps, "--trainer.use_cpu", "true", "--trainer.mixed_precision", "no"]
        words += ["--trainer.global_batch_size", "null", "--trainer.per_device_train_batch_size", "8"]
    elif "finetuning/finetune.py" in line:
        words += ["--trainer.max_steps", "2", "--trainer.use_cpu", "true", "--trainer.mixed_precision", "no"]
    elif "adapt.py" in line:
        words += [
            "--embedding-steps",
            "2",
            "--piece-chars",
            "400",
            "--trainer.max_steps",
            "2",
            "--dataset.max_seq_length",
            "32",
        ]
        words += ["--trainer.use_cpu", "true", "--trainer.mixed_precision", "no", "--trainer.torch_compile", "false"]
    elif "contrastive/" not in line and any(
        s in line for s in ("pretrain.py", "preprocess.py", "longer_seq.py", "pipeline.py")
    ):
        words += tiny_overrides(words)
    if "run_glue.py" in line:
        words += ["--trainer.max_steps", "2", "--trainer.use_cpu", "true", "--trainer.mixed_precision", "no"]
    if "scripts/experiments/" in line:
        tiny = list(zip(TINY[::2], TINY[1::2]))
        words += ["--threads", "1", *(word for pair in tiny if pair[0] != "--dataset.path" for word in pair)]
        words += ["--seconds", "0.1", "--speed-steps", "2"] if "yardstick.py" in line else []
    if "save_cost.py" in line:
        words += ["--hidden-size", "64", "--num-layers", "1", "--vocab-size", "512", "--repeats", "1"]
    monkeypatch.chdir(clone)
    # That a stage gets a process of its own is seen in the tests of pipelines. Those of a benchmark are forked here, so
    # that they import nothing. Of the standard library a package is read.
    monkeypatch.setattr(pipeline, "run_command", lambda command: run_script([*command[1:]]))
    if "benchmarks/" in line:
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORK)
    paths = {"stdlib": str(Path(asyncio.__file__).parent)}
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *more: paths.get(name) or get_path(name, *more))
    if words[0] == "torchrun":
        options = parse_args(words[1:])
        assert options.nproc_per_node == "2"
        run_in_two(lambda: run_script([options.training_script, *options.training_script_args]), clone)
        return
    assert words[0] == "python", f"do not know how to run: {line}"
    if target is not None:
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path(target).write_text(done.stdout)
        assert "trainer.train_batch_size" in done.stderr, "the edits are listed"
        return
    with forked_probes():
        assert run_script(words[1:]) == 0, line


def run_script(words: list[str]) -> int:
    """The exit code of a script with its arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        is_command = words[:2] == ["-m", "neobert"]
        patch.setattr(sys, "argv", words[1:] if is_command else words)
        run = runpy.run_module if is_command else runpy.run_path
        with pytest.raises(SystemExit) as ended:
            run("neobert" if is_command else words[0], run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("lines", CHAINS)
def test_the_commands_of_the_pages_run_in_order(
    lines: list[str], clone: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lines[0] != FIRST:
        shutil.copytree(quickstart, clone / "outputs" / "quickstart")
    for line in lines:
        run(line, clone, monkeypatch)


def test_every_command_of_a_page_is_in_one_chain() -> None:
    for page in PAGES:
        lines = [line for chain in chains_of(page) for line in chain]
        assert sorted(lines) == sorted(commands_of(page))
    named = {page.stem for page in PAGES if commands_of(page)}
    pages = {"README", "training", "evaluation", "inference", "prepare", "data", "resume", "export", "contrastive"}
    assert named >= pages | {"recipes"}
    prepare = chains_of(ROOT / "docs" / "prepare.md")
    assert len(prepare) > 2
    assert [len(chain) for chain in prepare if "train_tokenizer.py" in chain[0]] == [5], "what uses it comes after it"


def test_the_python_blocks_of_the_pages_run(
    clone: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    shutil.copytree(quickstart, clone / "outputs" / "quickstart")
    real = config_load.load_config
    monkeypatch.setattr(config_load, "load_config", lambda path, more=(): real(path, [*more, *TINY]))
    pages = [ROOT / "README.md", ROOT / "docs" / "inference.md"]
    blocks = [b for page in pages for b in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)]
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "finished" in capsys.readouterr().out


def needs(block: str) -> set[str]:
    """Top-level packages that a block imports."""
    nodes = list(ast.walk(ast.parse(block)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


EXPORT_BLOCKS = {
    "transformers": (set(), "torch.Size([2, "),
    "token classification": (set(), "torch.Size([2, "),
    "sentence-transformers": ({"sentence_transformers"}, "(2, 16)"),
    "ONNX": ({"onnx", "onnxruntime", "onnxscript"}, "(2, "),
    "our import": (set(), "eurobert 2 16 "),
}
"""The Python blocks of docs/export.md in their order: optional packages that one takes, and what it prints."""


@pytest.mark.parametrize("name", EXPORT_BLOCKS)
def test_a_python_block_of_the_export_page_runs(
    name: str, clone: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.S | re.M)
    assert len(blocks) == len(EXPORT_BLOCKS), "a block that is not listed would not be run"
    block, (packages, printed) = blocks[list(EXPORT_BLOCKS).index(name)], EXPORT_BLOCKS[name]
    optional = needs(block) & {"sentence_transformers", "onnxruntime"}
    assert optional <= packages
    for package in sorted(packages):
        pytest.importorskip(package)
    monkeypatch.chdir(clone)
    shutil.copytree(quickstart, clone / "outputs" / "quickstart")
    for form in ("native", "remote_code"):
        output = {"native": "outputs/quickstart_hf", "remote_code": "outputs/quickstart_code"}[form]
        if output in block:
            export = f"python scripts/export/export_hf.py outputs/quickstart --output {output} --format {form}"
            run(export, clone, monkeypatch)
    capsys.readouterr()
    exec(compile(block, "export.md", "exec"), {})
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("name", SERVED)
def test_the_commands_of_a_page_up_to_a_server_that_is_asked(
    name: str, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, model = ROOT / "docs" / name, SERVED[name]
    *prepare, serve, ask = commands_of(page)
    assert len(prepare) == {"serving.md": 3, "tutorial.md": 8}[name]
    for line in prepare:
        run(line, clone, monkeypatch)
    port = str(free_port())
    words = shlex.split(serve.removesuffix(" &").replace("8000", port))
    # A process of its own is seen in the tests of the command.
    log = tmp_path / "errors"
    child = fork(lambda: run_script(words[1:]), tmp_path / "printed", errors=log)
    try:
        wait_until(lambda: log.is_file() and log.read_text().startswith(f"{model} at http://127.0.0.1:"), child, log)
        asked = shlex.split(ask.replace("8000", port))
        request = Request(asked[2], asked[asked.index("-d") + 1].encode())
        with urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert (len(answer["data"]), answer["model"]) == (2, model)
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M):
            capsys.readouterr()
            exec(compile(block.replace("8000", port), name, "exec"), {})
            assert capsys.readouterr().out.startswith("2 16 ")
        os.kill(child, signal.SIGINT)
        assert wait_for(child) == 0
    except BaseException:
        kill(child)
        raise


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_two_blocks_of_the_readme_are_the_two_commands() -> None:
    first, second = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[:2]
    assert "configs/pretraining/quickstart.yaml" in first
    assert second.rstrip().endswith("pytest")
    assert all("venv" in block and "pip install" in block for block in (first, second))


def test_the_tests_that_the_fault_matrix_names_exist() -> None:
    page = (ROOT / "docs" / "resume.md").read_text()
    named = {*re.findall(r"\btest_\w+(?=\.py::|`|\[)", page), *re.findall(r"::(test_\w+)", page)}
    assert len(named) > 30
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert {n for n in named if n not in files and not any(f"def {n}(" in s for s in sources)} == set()
