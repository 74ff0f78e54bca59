"""`trainer.overwrite_output_dir` sets runs aside and nothing else, whatever kind of folder they are in."""

import errno
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neobert.config.schema import Config
from neobert.contrastive.finetune import next_commands
from neobert.errors import StartupError
from neobert.objectives.table import OBJECTIVES
from neobert.train.checkpoint.run_folder import check_output_dir, holds_run, set_aside
from neobert.train.loop import pretrain
from neobert.train.pretraining import pretraining_commands

Tiny = Callable[..., Config]
SHORT = ("trainer.max_steps=1", "trainer.eval_strategy=no")
OVERWRITE = "trainer.overwrite_output_dir=true"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(tiny(out, *SHORT))
    return out


def copy_run(trained: Path, to: Path) -> bytes:
    """A run at `to`; the bytes of its log."""
    to.mkdir(parents=True, exist_ok=True)
    os.system(f"cp -r {trained}/. {to}")
    return (to / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    "found", ["checkpoints/chapter-1.txt", "checkpoints/7/figure.png", "log.jsonl", "events.jsonl"]
)
@pytest.mark.parametrize("more", [(), (OVERWRITE,), ("trainer.resume_from_checkpoint=latest",)])
def test_what_is_no_run_is_left_alone(tiny: Tiny, tmp_path: Path, found: str, more: tuple[str, ...]) -> None:
    out = tmp_path / "thesis"
    (out / found).parent.mkdir(parents=True)
    (out / found).write_text('{"a": "line of somebody else"}\n')
    (out / "thesis.tex").write_text("text")
    name = found.split("/")[0]
    with pytest.raises(StartupError, match=rf"trainer.output_dir: \S+thesis has {name}, but no checkpoint .* move it"):
        pretrain(tiny(out, *SHORT, *more))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis"]
    assert {p.name for p in out.iterdir()} <= {name, "thesis.tex", ".lock"}
    assert (out / found).read_text() == '{"a": "line of somebody else"}\n'


def test_an_empty_folder_of_checkpoints_is_nothing(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert not holds_run(tmp_path / "run")
    assert pretrain(tiny(tmp_path / "run", *SHORT)).state.step == 1


def test_a_run_is_renamed_whole(tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    log = copy_run(trained, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(StartupError, match="already holds a run"):
        pretrain(tiny(tmp_path / "run", *SHORT))
    pretrain(tiny(tmp_path / "run", *SHORT, OVERWRITE))
    assert (tmp_path / "run.old-1" / "log.jsonl").read_bytes() == log
    assert (tmp_path / "run.old-1" / "notes.txt").read_text() == "mine"
    assert holds_run(tmp_path / "run")


def test_behind_a_link_the_folder_that_it_names_is_set_aside(tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    log = copy_run(trained, tmp_path / "big_disk" / "run")
    link = tmp_path / "home" / "run"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "big_disk" / "run")
    pretrain(tiny(link, *SHORT, OVERWRITE))
    assert link.is_symlink()
    assert sorted(p.name for p in link.parent.iterdir()) == ["run"]
    assert (tmp_path / "big_disk" / "run.old-1" / "log.jsonl").read_bytes() == log
    assert holds_run(tmp_path / "big_disk" / "run"), "the new run is on the disk of the old one"


@pytest.mark.parametrize("name", [".", "..", "absolute"])
def test_the_folder_that_is_the_working_directory_keeps_its_name(
    tiny: Tiny, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "here"
    log = copy_run(trained, out)
    (out / "code.py").write_text("mine")
    (out / "below").mkdir()
    monkeypatch.chdir(out / "below" if name == ".." else out)
    pretrain(tiny(out if name == "absolute" else Path(name), *SHORT, OVERWRITE))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]
    assert (out / "old-1" / "log.jsonl").read_bytes() == log
    assert (out / "old-1" / "checkpoints" / "1" / "manifest.json").is_file()
    assert (out / "code.py").read_text() == "mine"
    assert holds_run(out)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_renamed_keeps_its_name(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A mount point, as volumes of containers are; a parent that cannot be written."""
    volume, rename = tmp_path / "volume", Path.rename
    log = copy_run(trained, volume)

    def refuse(path: Path, target: Path) -> Path:
        if path == volume:
            raise OSError(number, os.strerror(number), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert set_aside(volume) == volume / "old-1"
    assert (volume / "old-1" / "log.jsonl").read_bytes() == log
    assert not holds_run(volume)
    copy_run(trained, volume)
    assert set_aside(volume) == volume / "old-2"


def test_a_run_that_cannot_be_moved_at_all_is_a_sentence(
    tiny: Tiny, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = copy_run(trained, tmp_path / "run")

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StartupError, match=r"overwrite_output_dir: the run in \S+run cannot be moved .*Read-only"):
        pretrain(tiny(tmp_path / "run", *SHORT, OVERWRITE))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/1", "checkpoints/1/tokenizer", "config.yaml/run"])
@pytest.mark.parametrize("more", [(), (OVERWRITE,), ("trainer.resume_from_checkpoint=latest",)])
def test_a_part_of_another_run_is_no_output_folder(
    tiny: Tiny, tmp_path: Path, trained: Path, inside: str, more: tuple[str, ...]
) -> None:
    copy_run(trained, tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(StartupError, match=rf"output_dir: \S+{inside} is a part of the run in \S+run, which it would"):
        pretrain(tiny(tmp_path / "run" / inside, *SHORT, *more))
    assert snapshot(tmp_path) == before


def test_a_folder_of_weights_is_no_output_folder(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(StartupError, match=r"holds the weights model.safetensors"):
        pretrain(tiny(tmp_path, *SHORT))


@pytest.mark.parametrize(
    ("data", "out"),
    [
        ("data", "data"),
        ("data", "data/out"),
        ("data/*.jsonl", "data"),
        ("data/**/*.json*", "data/a/out"),
        ("data/*/*.jsonl", "data/out"),
        ("link", "data/out"),
        ("data", "link/out"),
    ],
)
def test_no_run_writes_into_its_own_data(tiny: Tiny, corpus: Path, tmp_path: Path, data: str, out: str) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    before = snapshot(tmp_path)
    with pytest.raises(StartupError, match=r"output_dir: \S+ .*dataset.path: \S+ is searched for files"):
        pretrain(tiny(tmp_path / out, *SHORT, f"dataset.path={tmp_path / data}"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "out"), [("data/*.txt", "data"), ("data", "data/.out"), ("data/*.jsonl", "data/out"), ("data", "data-out")]
)
def test_beside_its_data_a_run_may_write(tiny: Tiny, tmp_path: Path, data: str, out: str) -> None:
    (tmp_path / "data").mkdir()
    check_output_dir(tiny(tmp_path / out, f"dataset.path={tmp_path / data}"))


@pytest.mark.parametrize("key", ["model.init_from", "tokenizer.path", "dataset.path"])
def test_the_run_that_a_config_reads_is_not_set_aside(tiny: Tiny, tmp_path: Path, trained: Path, key: str) -> None:
    copy_run(trained, tmp_path / "run")
    (tmp_path / "run" / "tokenized").mkdir()
    inside = {"tokenizer.path": "checkpoints/1/tokenizer", "dataset.path": "tokenized"}.get(key, "")
    before = snapshot(tmp_path)
    with pytest.raises(StartupError, match=rf"{key}: \S+run\S* is a part of the run that .* would set aside"):
        pretrain(tiny(tmp_path / "run", *SHORT, OVERWRITE, f"{key}={tmp_path / 'run' / inside}"))
    assert snapshot(tmp_path) == before


def test_data_in_the_output_folder_stay_where_the_config_finds_them(
    tiny: Tiny, corpus: Path, tmp_path: Path, trained: Path
) -> None:
    out = tmp_path / "run"
    log = copy_run(trained, out)
    shutil.copytree(corpus, out / "data")
    pretrain(tiny(out, *SHORT, OVERWRITE, f"dataset.path={out}/data/*.jsonl*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert (out / "old-1" / "log.jsonl").read_bytes() == log
    assert holds_run(out)


def test_a_config_that_was_typed_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("# my experiment\nseed: 3\n")
    pretrain(tiny(out, *SHORT))
    assert (out / "config.yaml.old-1").read_text() == "# my experiment\nseed: 3\n"
    pretrain(tiny(out, *SHORT, "trainer.max_steps=2", "trainer.resume_from_checkpoint=latest"))
    assert sorted(p.name for p in out.glob("config.yaml*")) == ["config.yaml", "config.yaml.old-1"]
    assert "max_steps: 2" in (out / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "words"), [("file", "a file of"), ("dangling", "a link that leads nowhere"), ("x" * 300, "too long")]
)
def test_a_folder_that_cannot_be_made_is_a_sentence(tiny: Tiny, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(StartupError, match=rf"trainer.output_dir: .* cannot be (made|read) \(.*{words}"):
        pretrain(tiny(tmp_path / name, *SHORT))


@pytest.mark.parametrize("commands", [pretraining_commands, next_commands])
def test_the_next_commands_can_be_typed_for_any_folder(commands: Callable[[Any], list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "my runs; rm $HOME" / "it's"
    run = SimpleNamespace(output_dir=folder, num_steps=2, config=Config(), objective=OBJECTIVES["mlm"])
    assert all(any(word.startswith(str(folder)) for word in shlex.split(command)) for command in commands(run))
