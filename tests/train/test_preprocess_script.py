"""preprocess.py: the tokens a run would make by itself, the command it prints, and the preview of the first rows."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from calls import call
from datasets import load_from_disk
from records import log_lines

from neobert.commands.preprocess import choose_output
from neobert.commands.training_commands import parse_command_line
from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config
from neobert.config.schema_data import MixtureSource
from neobert.data.pipeline import build_tokenizer
from neobert.data.store import prepare
from neobert.data.store.arrow import read_manifest
from neobert.data.store.offline import data_overrides, prepare_sources
from neobert.train.loop import pretrain

Write = Callable[..., Path]


@pytest.fixture
def write(tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes `run.yaml` of the tiny run into a folder of its own, which becomes the current one."""
    monkeypatch.chdir(tmp_path)

    def run_file(*overrides: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(config_to_yaml(tiny(Path("outputs/run"), "trainer.max_steps=3", *overrides)))
        return path

    return run_file


def run_printed(out: str) -> None:
    """Runs the command in the last line of an output."""
    words = shlex.split(out.splitlines()[-1])
    assert words[:2] == ["neobert", "pretrain"]
    pretrain(parse_command_line(words[2:], description="", program=""))


def test_the_printed_command_trains_on_the_same_rows(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """As the run that tokenises by itself, bit for bit; `streaming: true` does not stop it."""
    write("dataset.streaming=true")
    assert call("pretraining/preprocess.py", "run.yaml", "--report", "--seed", "4") == 0
    out = capsys.readouterr().out
    assert "tokenized_data/run/train: 240 documents" in out
    assert Path("tokenized_data/run/train/report.svg").is_file()
    run_printed(out)
    pretrain(load_config("run.yaml", ["--seed=4", "dataset.streaming=false", "trainer.output_dir=outputs/own"]))
    own, printed = (log_lines(Path("outputs") / name, "step") for name in ("own", "run"))
    assert [line["loss_hex"] for line in own] == [line["loss_hex"] for line in printed]
    assert len(own) == 3


def test_every_split_that_the_run_needs(write: Write, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("files").absolute()
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((corpus / "part-0.jsonl").read_bytes())
    for name in ("dev", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"the cat likes the {name}"}) + "\n")
    write(f"dataset.path={folder}", "dataset.pre_tokenize_output=tokens", "dataset.num_proc=1")
    assert call("pretraining/preprocess.py", "run.yaml") == 0
    found = load_from_disk("tokens")
    assert {name: len(rows) for name, rows in found.items()} == {"train": 150, "test": 1}
    run_printed(capsys.readouterr().out)
    assert log_lines(Path("outputs/run"), "eval")[-1]["num_documents"] == 1
    call("pretraining/preprocess.py", "run.yaml", "dataset.eval_split=dev", "dataset.pre_tokenize_output=others")
    assert sorted(load_from_disk("others")) == ["dev", "train"]


def test_a_tokenizer_to_train_is_trained_first(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("tokenizer.path=null", "tokenizer.train=true", "tokenizer.vocab_size=300", "tokenizer.train_documents=50")
    assert call("pretraining/preprocess.py", "run.yaml") == 0
    assert Path("tokenized_data/run/tokenizer/tokenizer.json").is_file()
    manifest = read_manifest(Path("tokenized_data/run/train"))
    assert manifest is not None
    assert manifest["tokenizer_name"] == "trained"
    run_printed(capsys.readouterr().out)
    info = json.loads(Path("outputs/run/checkpoints/3/tokenizer_info.json").read_text())
    assert info["digest"] == manifest["tokenizer_digest"]


def test_where_the_tokens_go(tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    base = tiny(tmp_path / "out")
    for path, name, output, folder, source in (
        ("a.jsonl", None, None, "tokenized_data/run", "a.jsonl"),
        ("new", "some/name", None, "new", None),
        ("there", "some/name", None, "tokenized_data/run", "there"),
        (None, "some/name", None, "tokenized_data/run", None),
        ("new", "some/name", "chosen", "chosen", None),
        ("a.jsonl", None, "chosen", "chosen", "a.jsonl"),
    ):
        section = replace(base.dataset, path=path, name=name, pre_tokenize_output=output)
        found, config = choose_output(replace(base, dataset=section), "run")
        assert (str(found), config.dataset.path) == (folder, source)


def test_a_second_start_finds_the_output_in_dataset_path(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("dataset.name=python_stdlib", "dataset.path=tokens", "dataset.name=python_stdlib")
    config = load_config("run.yaml")
    assert choose_output(config, "run")[0] == Path("tokens")
    Path("tokens/.tmp-train").mkdir(parents=True)
    Path("tokens/.tmp-train/progress.json").write_text("{}")
    assert choose_output(config, "run")[1].dataset.path is None, "an unfinished output is continued"


def test_several_sources_become_one_folder_each(
    tiny: Callable[..., Config], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture = (
        MixtureSource(path=str(corpus / "part-0.jsonl"), weight=0.75),
        MixtureSource(path=str(corpus / "part-1.jsonl.gz"), weight=0.25, max_documents=7),
    )
    base = tiny(tmp_path / "out")
    config = replace(base, dataset=replace(base.dataset, path=None, mixture=mixture))
    tokenizer = build_tokenizer(config, None, tmp_path)
    prepared = prepare_sources(config.dataset, tokenizer, Path("tokens"), tokenizer_name="t")
    assert [str(source.folder) for source in prepared] == ["tokens/0-part-0.jsonl", "tokens/1-part-1.jsonl.gz"]
    assert [source.manifests["train"]["num_documents"] for source in prepared] == [150, 7]
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    found = load_config("run.yaml", data_overrides(prepared, config.dataset)).dataset
    assert found.path is None
    assert [(source.path, source.split, source.weight) for source in found.mixture] == [
        ("tokens/0-part-0.jsonl", "train", 0.75),
        ("tokens/1-part-1.jsonl.gz", "train", 0.25),
    ]


def test_a_source_that_is_tokenised_already_is_refused(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    call("pretraining/preprocess.py", "run.yaml")
    assert call("pretraining/preprocess.py", "run.yaml", "dataset.path=tokenized_data/run") == 2
    assert "tokenized_data/run is tokenised already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["stream", "indexed", "mask_all"])
def test_debug_shows_rows_and_the_mix_and_writes_nothing(
    kind: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"stream": [], "indexed": ["dataset.streaming=false"], "mask_all": ["datacollator.mask_all=true"]}[kind]
    path = write("trainer.per_device_train_batch_size=64", *extra)
    assert call("pretraining/preprocess.py", str(path), "--debug") == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.yaml"]
    out = capsys.readouterr().out
    assert re.search(r"row 0: \d+ documents in \d+ of 64 slots", out)
    assert out.count("\nrow ") == 3
    assert re.search(r"\.jsonl(\.gz)?: split train, (content gzip, )?column text", out)
    documents = re.findall(r"document \d+, slots (\d+) to (\d+): (.*)", out)
    assert all(text.startswith("[CLS]") and text.endswith("[SEP]") for *_, text in documents)
    assert re.search(r"slot \d+: predict '[^']+' from \[MASK\]", out)
    found = re.search(r"first step = ([\d.]+)%.*\[MASK\] ([\d.]+)%, random ([\d.]+)%, kept ([\d.]+)%", out, re.S)
    assert found is not None
    predicted, masked, drawn, kept = map(float, found.groups())
    assert predicted == pytest.approx(20, abs=0.5)
    if kind == "mask_all":
        assert (masked, drawn, kept) == (100, 0, 0)
    else:
        assert (masked, drawn, kept) == (pytest.approx(80, abs=5), pytest.approx(10, abs=4), pytest.approx(10, abs=4))


@pytest.mark.parametrize("several", [False, True])
def test_a_run_finds_what_was_prepared_in_its_folder(
    write: Write, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pre_tokenize` with the same output tokenises nothing again; a cap and a slice are part of what is compared."""
    config = load_config(str(write("dataset.pre_tokenize=true", "dataset.pre_tokenize_output=tokens")))
    if several:
        paths = sorted(Path(str(config.dataset.path)).iterdir())
        sources = ", ".join(f"{{path: {path}, max_documents: 60}}" for path in paths)
        write(
            "dataset.pre_tokenize=true",
            "dataset.pre_tokenize_output=tokens",
            "dataset.path=null",
            f"dataset.mixture=[{sources}]",
        )
    assert call("pretraining/preprocess.py", "run.yaml") == 0
    monkeypatch.setattr(prepare, "_write", lambda *a: pytest.fail("tokenised a second time"))
    pretrain(load_config("run.yaml"))


def test_two_slices_of_one_split_are_both_prepared(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("dataset.train_split=train[40:]", "dataset.eval_split=train[:40]", "dataset.eval_samples=null")
    assert call("pretraining/preprocess.py", "run.yaml") == 0
    counts = {
        p.parent.name: read_manifest(p.parent)["num_documents"]
        for p in Path("tokenized_data/run").glob("*/manifest.json")
    }
    assert counts == {"train": 200, "validation": 40}
    run_printed(capsys.readouterr().out)
    write("dataset.train_split=train[40:]", "dataset.eval_split=train[:50]", "dataset.eval_samples=null")
    assert call("pretraining/preprocess.py", "run.yaml") == 2
    assert "overlaps dataset.train_split" in capsys.readouterr().err
