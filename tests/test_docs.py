"""Every command and every Python block of README.md and docs/ runs, in order, with a small model and a small corpus."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port
from small_corpus import make_texts

import neobert.config.load as config_load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def own_commands() -> list[tuple[str, str]]:
    found = [(page.name, line) for page in PAGES for line in commands_of(page)]
    return [(page, line) for page, line in found if not line.startswith(ENVIRONMENT)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, with a text of the user's own."""
    folder = tmp_path_factory.mktemp("clone")
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
    (folder / "OLD.yaml").write_text(
        "dataset: {name: x}\ntokenizer: {name: y}\ntrainer: {max_steps: 5, report_to: []}\n"
    )
    return folder


def tiny_overrides(words: list[str]) -> list[str]:
    """`TINY`, which wins over a command's own words; but tokenised data, its tokenizer, and the budget of a run that is
    only prepared or profiled stay those of the command."""
    own = [key for key in TOKENIZER_KEYS if "--tokenizer.path" in words]
    own += ["--dataset.path"] if any(word.startswith("tokenized_data/") for word in words) else []
    keeps_budget = {"--prepare-only", "--trainer.profiler_steps", "scripts/pipeline.py"} & {*words}
    own += ["--trainer.max_steps"] if keeps_budget else []
    pairs = dict(zip(TINY[::2], TINY[1::2]))
    if "--dataset.mixture" in words:  # Goes on from a run of two steps.
        own.append("--dataset.path")
        pairs["--trainer.max_steps"] = "4"
    if "--trainer.resume_from_checkpoint" in words and any("outputs/trunk" in word for word in words):
        pairs["--trainer.max_steps"] = "4"
    return [word for key, value in pairs.items() if key not in own for word in (key, value)]


def run(line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    target = None
    if ">" in words:
        words, target = words[: words.index(">")], words[-1]
    if "contrastive/finetune.py" in line and words[0] == "python":
        steps = "4" if "latest" in words else "2"
        words += ["--trainer.max_steps", steps, "--trainer.use_cpu", "true", "--trainer.mixed_precision", "no"]
        words += ["--trainer.global_batch_size", "null", "--trainer.per_device_train_batch_size", "8"]
    elif "contrastive/" not in line and any(
        s in line for s in ("pretrain.py", "preprocess.py", "longer_seq.py", "pipeline.py")
    ):
        words += tiny_overrides(words)
    if "scripts/experiments/" in line:
        tiny = list(zip(TINY[::2], TINY[1::2]))
        words += ["--threads", "1", *(word for pair in tiny if pair[0] != "--dataset.path" for word in pair)]
        words += ["--seconds", "0.1", "--speed-steps", "2"] if "yardstick.py" in line else []
    if "save_cost.py" in line:
        words += ["--hidden-size", "64", "--num-layers", "1", "--vocab-size", "512", "--repeats", "1"]
    monkeypatch.chdir(workplace)
    if words[0] == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port()), *words[1:]]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    assert words[0] == "python", f"do not know how to run: {line}"
    monkeypatch.setattr(sys, "argv", words[1:])
    if target is not None:
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path(target).write_text(done.stdout)
        assert "trainer.report_to" in done.stderr, "the edits are listed"
        return
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(words[1], run_name="__main__")
    assert not exit_info.value.code, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_order(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands_of(page):
        if not line.startswith(ENVIRONMENT):
            run(line, workplace, monkeypatch)


def test_the_pages_have_commands() -> None:
    assert len(own_commands()) > 10
    pages = {"README", "training", "evaluation", "inference", "prepare", "data-and-resume", "export", "contrastive"}
    pages |= {"recipes"}
    assert {page for page, _ in own_commands()} >= {f"{name}.md" for name in pages}


def test_the_python_blocks_of_the_pages_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    real = config_load.load_config
    monkeypatch.setattr(config_load, "load_config", lambda path, more=(): real(path, [*more, *TINY]))
    if not (workplace / "outputs" / "quickstart").exists():
        run("python scripts/pretraining/pretrain.py configs/pretraining/quickstart.yaml", workplace, monkeypatch)
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
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.S | re.M)
    assert len(blocks) == len(EXPORT_BLOCKS), "a block that is not listed would not be run"
    block, (packages, printed) = blocks[list(EXPORT_BLOCKS).index(name)], EXPORT_BLOCKS[name]
    optional = needs(block) & {"sentence_transformers", "onnxruntime"}
    assert optional <= packages
    for package in sorted(packages):
        pytest.importorskip(package)
    monkeypatch.chdir(workplace)
    if not (workplace / "outputs" / "quickstart").exists():
        run("python scripts/pretraining/pretrain.py configs/pretraining/quickstart.yaml", workplace, monkeypatch)
    for form in ("native", "remote_code"):
        output = {"native": "outputs/quickstart_hf", "remote_code": "outputs/quickstart_code"}[form]
        if output in block and not (workplace / output).exists():
            export = f"python scripts/export/export_hf.py outputs/quickstart --output {output} --format {form}"
            run(export, workplace, monkeypatch)
    capsys.readouterr()
    exec(compile(block, "export.md", "exec"), {})
    assert printed in capsys.readouterr().out


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
