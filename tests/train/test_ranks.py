"""Ranks that differ stop before the first step or at the next evaluation; an error of one of them ends them all."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import wait_for
from poison import fork_run
from ports import free_port
from ranks import outcome_of, run_ranks

from neobert.config.schema import Config, ModelSection
from neobert.config.schema_data import MixtureSource
from neobert.data.rows.evaluation import EvalSet
from neobert.data.rows.loader import merge_states
from neobert.data.store import prepare
from neobert.errors import DataError, StartupError
from neobert.optim.sharded_weights import local
from neobert.train import loop
from neobert.train.checkpoint.replicas import compare_tensors
from neobert.train.loop import pretrain
from neobert.train.processes import agreement as facts
from neobert.train.processes.agreement import (
    RankError,
    agree,
    check_equal,
    describe_checkpoint,
    describe_config,
    describe_program,
    exchange,
    main_first,
    sharing_errors,
)
from neobert.weights.folder import checkpoint_steps

Tiny = Callable[..., Config]


def compare(every: list[Any], describe: Callable[[Any], Any] = lambda value: value) -> list[Any]:
    """What `check_equal` gives on each rank, None or an error."""
    return run_ranks(
        len(every), outcome_of(lambda runtime: check_equal(runtime, lambda: describe(every[runtime.rank])))
    )


# ---- what is compared ----


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=0.02", "optimizer.lr: 0.01 on rank 0; 0.02 on rank 1"),
        ("trainer.max_steps=9", "trainer.max_steps: 12 on rank 0; 9 on rank 1"),
        ("trainer.gradient_clipping=null", "trainer.gradient_clipping: 1.0 on rank 0; null on rank 1"),
        ("seed=4", "seed: 3 on rank 0; 4 on rank 1"),
        ("trainer.mixed_precision=auto", 'trainer.mixed_precision: "no" on rank 0; "auto" on rank 1'),
        ("trainer.per_device_eval_batch_size=2", "trainer.per_device_eval_batch_size: 4 on rank 0; 2 on rank 1"),
        ("dataset.on_bad_shard=skip", 'dataset.on_bad_shard: "error" on rank 0; "skip" on rank 1'),
        ("trainer.resume_from_checkpoint=latest", 'trainer.resume_from_checkpoint: null on rank 0; "latest" on rank 1'),
    ],
)
def test_a_key_that_differs_is_named_with_both_values(tiny: Tiny, tmp_path: Path, override: str, line: str) -> None:
    found = compare([tiny(tmp_path), tiny(tmp_path, override)], describe_config)
    assert [type(error) for error in found] == [RankError, RankError]
    assert [str(error).splitlines()[1].strip() for error in found] == [line, line]


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset.path=/elsewhere", "tokenizer.path=/there", "trainer.output_dir=/mnt/run", "dataset.cache_dir=/cache"],
        ["dataset.num_workers=3", "dataset.num_proc=1", "dataset.prefetch_factor=9", "dataset.pin_memory=false"],
        ["wandb.project=other", "trainer.disable_tqdm=true"],
    ],
)
def test_paths_threads_and_trackers_are_a_machines_own(tiny: Tiny, tmp_path: Path, overrides: list[str]) -> None:
    assert compare([tiny(tmp_path), tiny(tmp_path, *overrides)], describe_config) == [None, None]


def test_paths_of_a_mixture_are_a_machines_own_and_its_weights_are_not(tiny: Tiny, tmp_path: Path) -> None:
    def mixed(path: str, weight: float) -> Config:
        source = MixtureSource(path=path, weight=weight)
        config = tiny(tmp_path)
        return dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, mixture=(source,)))

    assert compare([mixed("/a", 1), mixed("/b", 1)], describe_config) == [None, None]
    assert "dataset.mixture: " in str(compare([mixed("/a", 1), mixed("/a", 2)], describe_config)[0])


def test_another_checkout_is_named_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, digest = describe_program(), facts._digest
    with monkeypatch.context() as patch:
        patch.setattr(facts, "_digest", lambda path: "edited" if path.name == "schedule.py" else digest(path))
        edited = describe_program()
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(facts.neobert, "__file__", str(tmp_path / "__init__.py"))
    message = str(compare([here, here, edited])[0])
    assert message.count("code of ") == 1
    assert "code of neobert/optim/schedule.py: " in message
    assert 'on rank 0 to 1; "edited" on rank 2' in message
    lines = str(compare([here, describe_program()])[0]).splitlines()
    assert "nothing on rank 1" in lines[2]
    assert lines[-2].strip().startswith("and "), "a whole checkout is not listed"


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real, here = facts.version, describe_program()
    monkeypatch.setattr(facts, "version", lambda name: "0.1" if name == "tokenizers" else real(name))
    message = str(compare([here, describe_program()])[0])
    assert f'version of tokenizers: "{real("tokenizers")}" on rank 0; "0.1" on rank 1' in message


def test_another_checkpoint_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    folders = [tmp_path / name / "checkpoints" / "4" for name in ("node0", "node1")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "train_state.json").write_text('{"step": 4}')
    assert compare(folders, describe_checkpoint) == [None, None]
    (folders[1] / "train_state.json").write_text('{"step": 4, "tokens": 1}')
    assert "train_state.json of the checkpoint: " in str(compare(folders, describe_checkpoint)[1])
    assert 'checkpoint: "4" on rank 0; null on rank 1' in str(compare([folders[0], None], describe_checkpoint)[0])


def test_a_secret_that_differs_is_not_shown() -> None:
    found = compare([{"dataset.name": "s3://me:secret1@bucket"}, {"dataset.name": "s3://me:secret2@bucket"}])
    assert "dataset.name: " in str(found[0])
    assert "secret" not in str(found[0])


def test_a_single_process_compares_nothing() -> None:
    class Alone:
        world = 1

    check_equal(Alone(), lambda: pytest.fail("nothing is described"))  # type: ignore[arg-type]
    compare_tensors(Alone(), pytest.fail, "now", pytest.fail)  # type: ignore[arg-type]


# ---- one error ends all ----


def test_an_error_of_one_rank_is_the_error_of_all() -> None:
    def work(runtime: Any) -> str:
        with sharing_errors(runtime):
            if runtime.rank == 1:
                raise DataError("part-3.jsonl cannot be read")
            exchange(runtime, "a value")
            exchange(runtime, "and another one, at which rank 1 never arrives")
        return "done"

    found = run_ranks(3, outcome_of(work))
    assert [type(error) for error in found] == [RankError, DataError, RankError]
    assert [str(error) for error in found] == [
        "rank 1: part-3.jsonl cannot be read",
        "part-3.jsonl cannot be read",
        "rank 1: part-3.jsonl cannot be read",
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_around_the_block_that_rank_0_runs_first(failing: int) -> None:
    ran: list[int] = []

    def work(runtime: Any) -> None:
        with sharing_errors(runtime):
            if runtime.rank == failing == 1:
                raise DataError("no disk")
            with main_first(runtime):
                if runtime.rank == failing:
                    raise DataError("no disk")
                ran.append(runtime.rank)

    found = run_ranks(2, outcome_of(work))
    assert sorted(map(str, found)) == ["no disk", f"rank {failing}: no disk"]
    assert ran == [], "what rank 0 failed at is not tried by the others"


def test_what_all_ranks_use_is_made_of_equal_things() -> None:
    made: list[int] = []

    def work(runtime: Any) -> None:
        with main_first(runtime, {"documents of corpus": f"sha256:{runtime.rank}"}):
            made.append(runtime.rank)

    found = run_ranks(2, outcome_of(work))
    assert all("documents of corpus: " in str(error) for error in found)
    assert made == []


def test_a_decision_of_rank_0_is_everybodys() -> None:
    def decide() -> int:
        raise StartupError("trainer.output_dir: full")

    assert run_ranks(2, lambda runtime: agree(runtime, lambda: runtime.rank)) == [0, 0]
    found = run_ranks(2, outcome_of(lambda runtime: agree(runtime, decide)))
    assert [str(error) for error in found] == ["trainer.output_dir: full"] * 2


def test_nothing_is_gathered_everywhere_while_ranks_agree() -> None:
    """A decision of rank 0 is sent once, and equal facts, weights and the end of a block are a sum each."""

    def work(runtime: Any) -> list[Any]:
        with sharing_errors(runtime):
            check_equal(runtime, lambda: {"seed": 3})
            with main_first(runtime):
                pass
            agree(runtime, lambda: "a decision")
            compare_tensors(runtime, tensors(), "now", pytest.fail)
        return runtime.gathered

    assert run_ranks(3, work) == [[], [], []]


def test_a_shard_that_one_of_two_readers_of_a_lane_skipped_is_noticed() -> None:
    def state(shards: list[int]) -> dict[str, Any]:
        lane = {"row": 3, "stream": {"epoch": 0, "skipped_shards": shards}}
        return {"next_batch_digest": None, "next_row": 8, "lanes": {"0": lane}}

    assert merge_states([state([]), state([])])["next_row"] == 8
    with pytest.raises(DataError, match=r"rank 1 .* lane 0 differently: .*dataset.on_bad_shard: skip"):
        merge_states([state([]), state([2])])


# ---- the same weights everywhere ----


def tensors(change: Callable[[torch.Tensor], Any] = lambda tensor: None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(64, 8, generator=generator) for name in ("a", "b", "c")}
    found["half"] = torch.ones(3, dtype=torch.bfloat16)
    found["step"] = torch.tensor(7.0)
    change(found["b"])
    return found


def compare_weights(change: Callable[[torch.Tensor], Any]) -> tuple[list[Any], list[str]]:
    warned: list[str] = []

    def work(runtime: Any) -> None:
        mine = tensors(change) if runtime.rank == 1 else tensors()
        compare_tensors(runtime, mine, "after step 9", lambda text: warned.append(text) if runtime.is_main else None)

    return run_ranks(3, outcome_of(work)), warned


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.mul_(1.1),
        lambda tensor: tensor[3, 3].fill_(torch.nan),
        lambda tensor: tensor[0, 0].add_(0.1),
    ],
)
def test_other_weights_are_named_with_rank_and_tensor(change: Callable[[torch.Tensor], Any]) -> None:
    found, warned = compare_weights(change)
    assert [type(error) for error in found] == [RankError] * 3
    assert "after step 9 weights or optimizer state of rank 1 differ from those of rank 0 (most in b: by " in str(
        found[0]
    )
    assert warned == []


def test_rounding_is_a_warning() -> None:
    found, warned = compare_weights(lambda tensor: tensor[5, 5].mul_(1 + 2e-7))
    assert found == [None] * 3
    assert len(warned) == 1
    assert "rank 1 differ from those of rank 0 by rounding, most in b: by " in warned[0]
    assert compare_weights(lambda tensor: None) == ([None] * 3, [])


# ---- real processes ----


def run_two(
    folder: Path,
    configs: list[Config],
    before: Callable[[], None] = lambda: None,
) -> list[str]:
    """Trains with a config for each of two processes, `before` in the second; their output, after both have failed."""
    port, logs = free_port(), [folder / "rank-0", folder / "rank-1"]
    changes = [lambda: None, before]
    processes = [
        fork_run(config, log, change, rank=rank, world=2, port=port)
        for rank, (config, log, change) in enumerate(zip(configs, logs, changes))
    ]
    assert [wait_for(process) for process in processes] == [1, 1], "both end by an error"
    return [log.read_text() for log in logs]


def test_two_processes_with_another_key_stop_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for text in run_two(tmp_path, [tiny(out), tiny(out, "optimizer.lr=0.02", "trainer.max_steps=9")]):
        assert "optimizer.lr: 0.01 on rank 0; 0.02 on rank 1" in text
        assert "trainer.max_steps: 12 on rank 0; 9 on rank 1" in text
    assert not out.exists()


def test_a_resume_on_other_files_is_refused_and_touches_nothing(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    pretrain(tiny(out, "trainer.max_steps=4"))
    other.mkdir()
    for file in corpus.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with (other / "part-0.jsonl").open("a") as handle:
        handle.write(json.dumps({"text": "one document more on the disk of the second machine"}) + "\n")
    log = (out / "log.jsonl").read_text()
    resume = ["trainer.resume_from_checkpoint=latest", "trainer.per_device_train_batch_size=2"]
    for text in run_two(tmp_path, [tiny(out, *resume), tiny(out, *resume, f"dataset.path={other}")]):
        assert "data fingerprint: " in text
        assert "on rank 1" in text
    assert (out / "log.jsonl").read_text() == log


@pytest.mark.parametrize("more", [[], ["trainer.parallel=hsdp", "trainer.shard_size=1"]], ids=["ddp", "hsdp"])
def test_weights_that_part_stop_the_run_before_they_are_saved(tiny: Tiny, tmp_path: Path, more: list[str]) -> None:
    step = loop.take_step

    def damage() -> None:
        def take_step(run: Any, *batch: Any) -> Any:
            made = step(run, *batch)
            if made[0].step == 6:
                local(run.module.encoder.layers[1].qkv.weight.data)[0, 0] += 1
            return made

        loop.take_step = take_step

    out = tmp_path / "run"
    for text in run_two(tmp_path, [tiny(out, "trainer.eval_steps=0", *more)] * 2, damage):
        assert "after step 8 weights or optimizer state of rank 1 differ from those of rank 0" in text
        assert "encoder.layers.1.qkv.weight" in text
    assert checkpoint_steps(out) == [4]
    assert json.loads((out / "events.jsonl").read_text().splitlines()[-1])["event"] == "ranks_differ"


@pytest.mark.filterwarnings("ignore:.*has no manifest.json")
def test_an_architecture_that_a_folder_brings_is_one_on_all_ranks(tiny: Tiny, tmp_path: Path) -> None:
    """Weights of the same shapes, another epsilon: gradients are shared, so no later comparison could find it."""
    pretrain(tiny(tmp_path / "source", "trainer.max_steps=1", "trainer.eval_strategy=no"))
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, epsilon in zip(folders, (1e-5, 1e-2)):
        shutil.copytree(tmp_path / "source" / "checkpoints" / "1", folder)
        (folder / "manifest.json").unlink()
        model = json.loads((folder / "model_config.json").read_text())
        (folder / "model_config.json").write_text(json.dumps(model | {"norm_eps": epsilon}))
    configs = [
        dataclasses.replace(config, model=ModelSection(init_from=str(folder)), explicit=frozenset())
        for config, folder in zip([tiny(tmp_path / "run")] * 2, folders)
    ]
    for text in run_two(tmp_path, configs):
        assert "model.norm_eps: 1e-05 on rank 0; 0.01 on rank 1" in text


def test_a_failure_is_reported_with_its_kind_and_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(runtime: Any) -> None:
        with sharing_errors(runtime):
            if runtime.rank == 1:
                raise KeyError("correct-horse-7")
            exchange(runtime)

    monkeypatch.setenv("MY_TOKEN", "correct-horse-7")
    # As it was sent: a rank that receives it may not know the variable.
    assert run_ranks(2, outcome_of(work))[0].args == ("rank 1: KeyError: '<hidden:MY_TOKEN>'",)


def test_evaluation_documents_that_one_process_cannot_read_end_both(tiny: Tiny, tmp_path: Path) -> None:
    batches = EvalSet.batches

    def break_disk() -> None:
        def broken(*args: Any, **named: Any) -> Iterator[Any]:
            yield next(batches(*args, **named))
            raise DataError("part-0.jsonl is gone from this node")

        EvalSet.batches = broken  # type: ignore[method-assign, assignment]

    first, second = run_two(tmp_path, [tiny(tmp_path / "run")] * 2, break_disk)
    assert "RankError: rank 1: part-0.jsonl is gone from this node" in first
    assert "DataError: part-0.jsonl is gone from this node" in second


def test_tokenising_is_not_started_on_other_documents(
    tiny: Tiny, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, some in (("one", texts), ("other", texts[1:])):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        (tmp_path / name / "part.jsonl").write_text(lines)

    def fail(*args: Any) -> Any:
        raise AssertionError("nothing is tokenised")

    monkeypatch.setattr(prepare, "_write", fail)
    configs = [
        tiny(tmp_path / "run", "dataset.streaming=false", f"dataset.path={tmp_path / name}")
        for name in ("one", "other")
    ]
    for text in run_two(tmp_path, configs):
        assert "documents of " in text
        assert "nothing is tokenised" not in text
