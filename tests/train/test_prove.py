"""A run's record holds, and one changed weight, batch, rate, loss or exported weight is found."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import call
from safetensors.torch import load_file, save_file

from neobert.config.schema import Config
from neobert.export.write import ExportRequest, export
from neobert.train.checkpoint.proof.digest_chain import PROOF_FILE, build_proof, chain_steps, read_steps
from neobert.train.checkpoint.proof.stretches import Segment, choose_segments, find_probabilities, list_segments
from neobert.train.loop import pretrain
from neobert.weights.folder import MANIFEST, Manifest, read_manifest, record_file

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6, and its export beside it."""
    folder = tmp_path_factory.mktemp("proof")
    settings = ["trainer.max_steps=6", "trainer.save_steps=2", "trainer.eval_steps=0", "trainer.fill_mask_texts=[]"]
    pretrain(tiny(folder / "run", *settings, "model.dropout_prob=0.1"))
    export(ExportRequest(source=str(folder / "run"), output=folder / "exported"))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "copy")) / "run"


def prove(run: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = call("prove.py", run, "--json", *words)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["passed"] == (code == 0)
    return code, found


def failures(found: dict[str, Any]) -> dict[str, str]:
    return {x["name"]: x["detail"] for x in found["evidence"] if x["verdict"] == "FAIL"}


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def change_weight(checkpoint: Path) -> None:
    """One weight, in the last bit but one, of a token that every row has."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.layers.0.down.weight"][0, 0] *= 1 + 2**-22
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def rewrite_manifest(checkpoint: Path) -> str:
    manifest = read_manifest(checkpoint)
    files = {name: record_file(checkpoint / name) for name in manifest.files}
    changed = Manifest(step=manifest.step, world_size=manifest.world_size, files=files)
    (checkpoint / MANIFEST).write_text(changed.to_text())
    return changed.digest


def test_a_run_and_its_export_hold(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = prove(trained / "run", capsys, "--from-start", "--export", trained / "exported")
    assert (code, failures(found)) == (0, {})
    verdicts = {x["name"]: x["verdict"] for x in found["evidence"]}
    assert set(verdicts.values()) == {"ok"}
    assert {"log", "rates", "checkpoints", "steps 1-2", "steps 3-4", "steps 5-6", "checkpoint 6"} <= verdicts.keys()
    assert {"export: chain", "export: weights"} <= verdicts.keys()
    assert set(found["probabilities"].values()) == {1.0}
    assert found["not_proven"]


def test_a_part_of_each_segment_is_a_smaller_proof(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call("prove.py", trained / "run", "--limit", 1, "--samples", 1, "--seed", 0) == 0
    said = capsys.readouterr()
    assert "1 steps of 6 are made again, from 1 of 2 checkpoints" in said.err
    assert " 25.00%  a step that was computed otherwise" in said.out
    assert "100.00%  a batch of other rows or masks" in said.out
    assert "not proven:" in said.out


def test_without_two_checkpoints_the_remedy_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    assert call("prove.py", run) == 2
    assert "--from-start makes them again from the first step" in capsys.readouterr().err


# ---- planted ----


def test_a_changed_weight_is_found_by_its_digest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_weight(run / "checkpoints" / "4")
    _, found = prove(run, capsys, "--limit", 1)
    assert "model.safetensors does not match its sha256" in failures(found)["checkpoint 4"]
    rewrite_manifest(run / "checkpoints" / "4")
    _, found = prove(run, capsys, "--limit", 1)
    assert failures(found)["checkpoint 4"] == "its manifest is not the one that events.jsonl has of it"


def test_a_changed_weight_is_found_by_training_where_all_digests_fit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weight(run / "checkpoints" / "4")
    digest = rewrite_manifest(run / "checkpoints" / "4")
    fits = lambda x: x | {"manifest": digest} if (x["event"], x["step"]) == ("saved", 4) else x  # noqa: E731
    rewrite(run / "events.jsonl", fits)
    _, found = prove(run, capsys)
    assert "model.safetensors: encoder.layers.0.down.weight" in failures(found)["checkpoint 4"]


@pytest.mark.parametrize("field", ["lr", "loss_hex", "batch_digest"])
def test_a_changed_line_of_the_log_is_found(run: Path, capsys: pytest.CaptureFixture[str], field: str) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        if (line["kind"], line["step"]) != ("step", 5):
            return line
        loss = line["loss"] * (1 + 2**-20)
        others = {"lr": {"lr": line["lr"] * 1.01}, "loss_hex": {"loss": loss, "loss_hex": loss.hex()}}
        return line | others.get(field, {"batch_digest": "0" * 16})

    rewrite(run / "log.jsonl", change)
    code, found = prove(run, capsys)
    assert code == 1
    expected = {"lr": {"rates", "steps 5-6"}, "loss_hex": {"steps 5-6"}, "batch_digest": {"steps 5-6"}}
    assert failures(found).keys() == expected[field]
    # Rates and batches of steps that are not made again are compared too.
    if field != "loss_hex":
        _, found = prove(run, capsys, "--limit", 1, "--samples", 1, "--seed", 0)
        assert failures(found)


def test_a_changed_data_file_is_found(
    tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(corpus, tmp_path / "data"))
    settings = [f"dataset.path={data}", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.eval_steps=0"]
    pretrain(tiny(tmp_path / "run", *settings))
    text = (data / "part-0.jsonl").read_text()
    (data / "part-0.jsonl").write_text(text.replace("the", "teh", 1))
    _, found = prove(tmp_path / "run", capsys)
    assert "the data under this run changed" in failures(found)["steps 2-2"]


def test_steps_after_a_rollback_are_left_open(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "6" / "train_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"skip_rows": [[8, 12]]}))
    _, found = prove(run, capsys, "--limit", 1)
    (row,) = [x for x in found["evidence"] if x["name"] == "steps 5-6"]
    assert row["verdict"] == "open"
    assert failures(found).keys() == {"checkpoint 6"}, "its file was changed"


def test_another_machine_is_compared_within_rounding(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(line: dict[str, Any]) -> dict[str, Any]:
        return line | {"machine": line["machine"] | {"cpu": "another"}} if line["event"] == "environment" else line

    def round_off(line: dict[str, Any]) -> dict[str, Any]:
        if line["kind"] != "step":
            return line
        loss = line["loss"] * (1 + 2**-20)
        return line | {"loss": loss, "loss_hex": loss.hex()}

    rewrite(run / "events.jsonl", other)
    rewrite(run / "log.jsonl", round_off)
    code, found = prove(run, capsys)
    (row,) = [x for x in found["evidence"] if x["name"] == "steps 3-4"]
    assert (code, row["verdict"]) == (0, "rounding")
    assert "cannot be: other cpu" in row["detail"]


def test_an_export_of_other_weights_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = run.with_name("exported")
    weights = load_file(exported / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    _, found = prove(run, capsys, "--limit", 1, "--export", exported)
    assert failures(found).keys() == {"export: file", "export: weights"}
    assert name in failures(found)["export: weights"]


# ---- the chain of an export ----


def test_an_export_carries_the_chain_and_no_path(trained: Path) -> None:
    proof = json.loads((trained / "exported" / PROOF_FILE).read_text())
    steps = read_steps(trained / "run")
    assert [x["step"] for x in proof["milestones"]] == [1, 2, 3, 4, 5, 6]
    assert proof["milestones"][-1]["loss_hex"] == steps[-1]["loss_hex"]
    assert dict(chain_steps(proof, steps))[6] == proof["chain"] == proof["milestones"][-1]["chain"]
    assert proof["checkpoints"].keys() == {"2", "4", "6"}
    assert all(len(machine["code"]) == 16 for machine in proof["machines"])
    assert str(trained) not in json.dumps(proof)
    assert f"`{proof['chain'][:16]}`" in (trained / "exported" / "README.md").read_text()


def test_the_chain_depends_on_every_step_and_on_the_data(trained: Path) -> None:
    steps, proof = read_steps(trained / "run"), build_proof(trained / "run" / "checkpoints" / "6")
    assert proof is not None
    ends = {list(chain_steps(proof | {"data_fingerprint": "another"}, steps))[-1][1]}
    for number in range(len(steps)):
        other = [line | {"lr": 1.0} if n == number else line for n, line in enumerate(steps)]
        ends.add(list(chain_steps(proof, other))[-1][1])
    assert len(ends) == 7
    assert proof["chain"] not in ends


def test_weights_without_their_log_have_no_proof(run: Path) -> None:
    (run / "log.jsonl").unlink()
    assert build_proof(run / "checkpoints" / "6") is None


# ---- which steps, and how probably ----


def test_segments_are_drawn_by_their_steps() -> None:
    assert list_segments([4, 8], from_start=True) == [Segment(0, 4), Segment(4, 8)]
    assert list_segments([8], from_start=False) == []
    segments = list_segments(range(0, 4000, 100), from_start=False)
    assert choose_segments(segments, 40, seed=1) == segments
    drawn = [choose_segments(segments, 20, seed) for seed in range(50)]
    assert all(10 <= len(x) <= 20 for x in drawn)
    assert {segment for x in drawn for segment in x} == set(segments)
    uneven = [Segment(0, 1), Segment(1, 10_000), Segment(10_000, 10_001)]
    assert all(choose_segments(uneven, 1, seed) == [uneven[1]] for seed in range(20))


def test_probabilities_are_those_of_what_is_compared() -> None:
    segments = list_segments([0, 10, 20, 30, 40], from_start=False)
    whole = find_probabilities(segments, segments, None, noted=0)
    assert set(whole.values()) == {1.0}
    half = find_probabilities(segments, segments[:2], None, noted=0)
    assert half == {"step": 0.5, "batch": 1.0, "rate": 1.0, "weight": 0.5, "weight_and_events": 0.5}
    limited = find_probabilities(segments, segments, 5, noted=4)
    assert (limited["step"], limited["weight"]) == (0.5, 1.0)


def test_what_could_not_be_compared_bit_for_bit_is_not_called_found() -> None:
    segments = list_segments([0, 10, 20, 30], from_start=False)
    found = find_probabilities(segments[:2], [], None, noted=0, unclear=segments[2:])
    assert found["step"] == found["weight_and_events"] == 0
    assert found["batch"] == found["rate"] == pytest.approx(2 / 3)


def test_lines_that_are_there_twice_or_without_their_numbers_fail(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "log.jsonl"
    lines = log.read_text()
    step = next(line for line in lines.splitlines() if '"kind": "step", "step": 5' in line)
    log.write_text(lines + step + "\n")
    code, found = prove(run, capsys, "--limit", 1)
    assert (code, failures(found)["log"]) == (1, "1 steps are there more than once")
    log.write_text(lines.replace("loss_hex", "loss_hexadecimal"))
    assert "step 1: loss or grad_norm is not its *_hex" in failures(prove(run, capsys, "--limit", 1)[1])["log"]


def test_steps_of_another_layout_are_rounding_and_without_their_data_open(
    tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, again = Path(shutil.copytree(corpus, tmp_path / "data")), tmp_path / "again"
    keys = [f"dataset.path={data}", "trainer.save_steps=2", "trainer.eval_steps=0", "scheduler.name=constant"]
    pretrain(tiny(again, *keys, "trainer.max_steps=4"))
    halved = ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2"]
    pretrain(tiny(again, *keys, *halved, "trainer.max_steps=6", "trainer.resume_from_checkpoint=latest"))
    shutil.rmtree(again / "checkpoints" / "4")
    code, found = prove(again, capsys)
    assert failures(found) == {}
    assert [x["verdict"] for x in found["evidence"] if x["name"] == "steps 3-6"] == ["rounding"]
    assert found["probabilities"]["step"] == 0
    shutil.rmtree(data)
    code, found = prove(again, capsys)
    assert (code, [x["verdict"] for x in found["evidence"] if x["name"] == "steps 3-6"]) == (0, ["open"])


def test_a_step_that_was_drawn_by_chance_is_found_as_often_as_is_said() -> None:
    segments = list_segments(range(0, 3000, 100), from_start=False)
    generator = random.Random(0)
    hits, said = 0, 0.0
    for seed in range(300):
        chosen = choose_segments(segments, 20, seed)
        changed = generator.randrange(2900)
        hits += any(x.start < changed + 1 <= x.end for x in chosen)
        said += find_probabilities(segments, chosen, None, noted=0)["step"]
    assert abs(hits - said) < 4 * (300 * 0.25) ** 0.5
