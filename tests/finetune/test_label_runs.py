"""Runs on labels: every kind learns, resumes exactly, answers with its labels, and says what it cannot learn from."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from calls import call
from children import fork, kill, wait_until
from datasets import Dataset
from safetensors.torch import load_file

import neobert
from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config, TokenizerSection
from neobert.data.source import tables
from neobert.data.source.hub import HubPin
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import DataError, StartupError
from neobert.finetune.job import choose_best_line, finetune, read_evaluations
from neobert.finetune.labelled_data import read_splits
from neobert.finetune.labels import (
    check_known,
    choose_initial_score,
    choose_kind,
    choose_labels,
    choose_weights,
    number_labels,
)
from neobert.objectives.label_answers import LabelledText, LabelledWords
from neobert.objectives.labelled_rows import encode_rows, encode_words
from neobert.train.loop import pretrain
from neobert.weights.encoder_weights import load_encoder_weights

ROOT = Path(__file__).parents[2]
EXACT = ("step", "loss_hex", "grad_norm_hex", "lr", "num_tokens", "num_targets", "batch_digest")
Labelled = Callable[..., Config]
KINDS = {
    "classes": ("classification", "accuracy"),
    "pairs": ("classification", "accuracy"),
    "numbers": ("regression", "spearman"),
    "several": ("multilabel", "micro_f1"),
    "words": ("tokens", "entity_f1"),
}


def steps(output_dir: Path, *, after: int = 0) -> list[tuple[object, ...]]:
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [tuple(x[k] for k in EXACT) for x in lines if x["kind"] == "step" and x["step"] > after]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_recognised_learned_and_resumed_exactly(
    labelled: Labelled, labelled_files: Path, tmp_path: Path, name: str
) -> None:
    kind, metric = KINDS[name]
    out = tmp_path / "whole"
    overrides = (f"dataset.path={labelled_files}/{name}.jsonl",)
    result = finetune(labelled(out, *overrides))
    saved = load_config(out / "config.yaml")
    assert (saved.finetune.kind, result.steps, result.reason) == (kind, 12, "finished")
    evaluations = read_evaluations(out)
    assert [line["step"] for line in evaluations] == [0, 4, 8, 12]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    best = min(evaluations[1:], key=lambda line: (-line["metrics"][metric], line["step"]))
    assert (result.best_step, result.metrics[metric]) == (best["step"], best["metrics"][metric])
    head = json.loads((out / "checkpoints/12/head.json").read_text())
    assert (head["kind"], tuple(head["labels"])) == (kind, saved.finetune.labels)

    resumed = tmp_path / "resumed"
    finetune(labelled(resumed, *overrides, f"trainer.resume_from_checkpoint={out}/checkpoints/4"))
    assert steps(resumed) == steps(out, after=4)
    assert read_evaluations(resumed)[-1] == evaluations[-1]
    weights = [load_file(folder / "checkpoints/12/model.safetensors") for folder in (out, resumed)]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_a_killed_run_resumes_as_typed(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    overrides = ("trainer.logging_steps=1", "trainer.save_steps=2", "trainer.eval_steps=2")
    finetune(labelled(whole, *overrides))
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(labelled(killed, *overrides, "trainer.resume_from_checkpoint=latest")))
    monkeypatch.setenv("NEOBERT_FAULT", "step.done@9:sleep60")
    victim = fork(lambda: int(call("finetuning/finetune.py", file)), tmp_path / "printed")
    wait_until((killed / "checkpoints/8/manifest.json").exists, victim, tmp_path / "printed")
    kill(victim)
    monkeypatch.delenv("NEOBERT_FAULT")
    assert call("finetuning/finetune.py", file) == 0
    assert "resuming from" in capsys.readouterr().out
    assert steps(killed) == steps(whole)


def test_it_starts_from_a_run_and_answers_with_labels_and_probabilities(
    tiny: Callable[..., Config], labelled: Labelled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny(tmp_path / "pretrained", "trainer.max_steps=2", "trainer.eval_steps=0"))
    out = tmp_path / "run"
    start = f"finetune.model={tmp_path}/pretrained"
    finetune(labelled(out, start, "trainer.max_steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0"))
    before = load_encoder_weights(tmp_path / "pretrained").tensors
    found = load_encoder_weights(out)
    assert found.objective == "sequence_classification"
    for name, tensor in before.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=1e-6)
    labels = load_config(out / "config.yaml").finetune.labels
    (answer,) = neobert.load(out).predict(["a text"])
    assert isinstance(answer, LabelledText)
    assert set(answer.probabilities) == set(labels)
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.label == max(answer.probabilities, key=lambda name: answer.probabilities[name])
    capsys.readouterr()
    assert call("predict.py", out, "a text", "--json") == 0
    assert json.loads(capsys.readouterr().out)["label"] == answer.label


@pytest.mark.parametrize("name", ["classes", "words"])
def test_answers_equal_the_predictions_of_the_evaluation(
    labelled: Labelled, labelled_files: Path, tmp_path: Path, name: str
) -> None:
    rows = [json.loads(line) for line in (labelled_files / f"{name}.jsonl").read_text().splitlines()]
    folder = tmp_path / "data"
    folder.mkdir()
    for split, part in (("train", rows), ("test", rows[:20])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    result = finetune(labelled(tmp_path / "run", f"dataset.path={folder}", "dataset.eval_samples=null"))
    labels = load_config(tmp_path / "run/config.yaml").finetune.labels
    model = neobert.load(tmp_path / f"run/checkpoints/{result.best_step}")
    assert result.predictions is not None
    said = [labels[number] for number in result.predictions]
    if name == "classes":
        answers = model.predict([row["text"] for row in rows[:20]])
        assert [x.label for x in answers if isinstance(x, LabelledText)] == said
    else:
        answers = model.predict([" ".join(row["tokens"]) for row in rows[:20]])
        assert [label for x in answers if isinstance(x, LabelledWords) for label in x.labels] == said


def test_the_best_checkpoint_is_that_of_the_metric_and_a_run_stops_early(labelled: Labelled, tmp_path: Path) -> None:
    out = tmp_path / "run"
    keys = ("trainer.save_best=true", "trainer.save_total_limit=1", "trainer.max_steps=40", "finetune.early_stopping=2")
    config = labelled(out, *keys, "trainer.eval_steps=2", "trainer.save_steps=2")
    result = finetune(config)
    lines = read_evaluations(out)[1:]
    best = max(lines, key=lambda line: (line["metrics"]["accuracy"], -line["step"]))
    assert (out / "checkpoints" / str(best["step"])).is_dir()
    assert json.loads((out / "checkpoints/best.json").read_text())["step"] == best["step"] == result.best_step
    assert result.steps == best["step"] + 4 < 40, "two evaluations after the best one"
    again = labelled(
        out, *keys, "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.resume_from_checkpoint=latest"
    )
    assert (finetune(again).reason, read_evaluations(out)[1:]) == ("complete", lines)


def test_frozen_layers_stay_and_deeper_ones_learn_slower(labelled: Labelled, tmp_path: Path) -> None:
    weights = {}
    for name, keys in (("frozen", ["finetune.num_frozen_layers=1"]), ("decayed", ["finetune.layer_lr_decay=1e-6"])):
        config = labelled(
            tmp_path / name, *keys, "trainer.save_steps=1", "trainer.max_steps=2", "scheduler.warmup_steps=0"
        )
        finetune(config)
        weights[name] = [load_file(tmp_path / name / f"checkpoints/{step}/model.safetensors") for step in (1, 2)]

    def change(name: str, tensor: str) -> float:
        first, second = weights[name]
        return float((first[tensor] - second[tensor]).abs().max())

    assert change("frozen", "encoder.embedding.weight") == change("frozen", "encoder.layers.0.qkv.weight") == 0
    assert change("frozen", "encoder.layers.1.qkv.weight") > 0
    assert change("decayed", "encoder.layers.0.qkv.weight") < 1e-3 * change("decayed", "encoder.layers.1.qkv.weight")
    assert change("decayed", "encoder.layers.1.qkv.weight") < 1e-3 * change("decayed", "classifier.weight")


def test_several_seeds_are_several_runs_and_a_table(
    labelled: Labelled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    keys = ("finetune.seeds=[5, 6]", "trainer.max_steps=2", "trainer.resume_from_checkpoint=latest")
    file.write_text(config_to_yaml(labelled(tmp_path / "out", *keys)))
    for _ in range(2):  # The second start finds both runs complete.
        assert call("finetuning/finetune.py", file) == 0
        lines = capsys.readouterr().out.splitlines()[-5:]
        assert [line.split()[0] for line in lines] == ["seed", "5", "6", "mean", "std"]
        found = json.loads((tmp_path / "out/seeds.json").read_text())
        accuracies = [found["seeds"][seed]["metrics"]["accuracy"] for seed in ("5", "6")]
        assert found["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    losses = [{line["loss"] for line in read_evaluations(tmp_path / f"out/seed-{seed}")} for seed in (5, 6)]
    assert losses[0].isdisjoint(losses[1])
    with pytest.raises(StartupError, match=r"finetune.seeds: \[5, 6\] are several runs"):
        finetune(load_config(file))


@pytest.mark.parametrize("score", [None, 40.0])
def test_numbers_start_at_the_mean_of_the_labels_or_where_it_is_said(
    labelled: Labelled, labelled_files: Path, tmp_path: Path, score: float | None
) -> None:
    overrides = [f"dataset.path={labelled_files}/numbers.jsonl", "trainer.max_steps=1", "trainer.save_strategy=no"]
    finetune(labelled(tmp_path, *overrides, *([] if score is None else [f"finetune.initial_score={score}"])))
    expected = load_config(tmp_path / "config.yaml").finetune.initial_score
    assert expected is not None
    assert expected == score if score else 1.0 < expected < 1.5
    answers = np.load(tmp_path / "predictions/0.npz")
    assert abs(float(answers["predictions"].mean()) - expected) < 0.2


def test_class_weights_balance_the_labels() -> None:
    labels = ("a", "b")
    weights = choose_weights("balanced", "classification", labels, ["a", "a", "a", "b"])
    assert weights is not None
    assert choose_weights(None, "classification", labels, ["a"]) is None
    assert [float(x) for x in weights] == pytest.approx([4 / 6, 2.0])
    with pytest.raises(
        DataError, match=r"finetune.class_weights: \['1'\] are 1 weights, but there are 2 labels \(a, b\)"
    ):
        choose_weights(("1",), "classification", labels, ["a"])


def test_labels_are_sorted_and_integers_may_be_numbers_of_names() -> None:
    rows = [("row", value) for value in (10, 2, 2)]
    assert choose_labels("classification", (), rows) == ("2", "10")
    assert number_labels("classification", ("no", "yes"), [1, 0, "yes"]) == [1, 0, 1]
    with pytest.raises(DataError, match=r"row: label '1' is none of the labels of the training data \(2, 10\)"):
        check_known("classification", ("2", "10"), [("row", 1)])
    np.testing.assert_array_equal(number_labels("multilabel", ("a", "b", "c"), [["c", "a"]])[0], [1, 0, 1])
    assert choose_kind("auto", [("row", "0.5"), ("row", "1")], is_words=False) == "regression"
    assert choose_kind("auto", [("row", "1"), ("row", "0")], is_words=False) == "classification"


FORMATS = ("csv", "parquet", "saved", "jsonl.gz")


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_every_format_are_the_same_examples(
    labelled: Labelled, labelled_files: Path, tmp_path: Path, form: str
) -> None:
    rows = [json.loads(line) for line in (labelled_files / "pairs.jsonl").read_text().splitlines()]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"rows.{form}"
    if form == "csv":
        pa_csv.write_csv(table, path)
    elif form == "parquet":
        pq.write_table(table, path)
    elif form == "saved":
        Dataset(table).save_to_disk(str(path))
    else:
        path.write_bytes(gzip.compress((labelled_files / "pairs.jsonl").read_bytes()))
    found, expected = (
        read_splits(labelled(tmp_path / "x", f"dataset.path={source}"))
        for source in (path, labelled_files / "pairs.jsonl")
    )
    for ours, theirs in ((found.train, expected.train), (found.evaluation, expected.evaluation)):
        assert [(x.texts, x.label) for x in ours] == [(x.texts, x.label) for x in theirs]
    assert len(found.evaluation) == 24
    assert len(found.train) + len(found.evaluation) == len(rows)


def test_rows_of_the_hub_are_read_at_one_commit(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(name: str, config: str | None, split: str, revision: str | None) -> list[dict[str, str]]:
        asked.append((name, config, split, revision))
        return [{"sentence": f"{split} {n}", "label": "ab"[n % 2]} for n in range(4)]

    monkeypatch.setattr(tables, "pin_hub", lambda spec: HubPin(spec=spec, commit="c0ffee"))
    monkeypatch.setattr(tables, "list_hub_splits", lambda pin: ["train", "validation", "test"])
    monkeypatch.setattr(tables, "read_hub", read)
    keys = ("dataset.path=null", "dataset.name=someone/rows", "dataset.config=en", "dataset.train_split=train[1:]")
    splits = read_splits(labelled(tmp_path / "x", *keys, "dataset.eval_samples=2"))
    assert asked == [("someone/rows", "en", name, "c0ffee") for name in ("train", "validation")]
    assert [x.texts for x in splits.train] == [("train 1",), ("train 2",), ("train 3",)]
    assert [x.texts for x in splits.evaluation] == [("validation 0",), ("validation 1",)]


def test_first_tokens_of_words_and_texts_that_are_cut(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=str(tokenizer_folder)))
    words = [["the", "unusualness", "of", "cats"], []]
    encoded = encode_words(tokenizer, words, 64)
    firsts = encoded.firsts[0]
    pieces = [tokenizer.decode(part) for part in np.split(encoded.tokens[0], firsts[1:])]
    assert [piece.strip() for piece in pieces] == words[0]
    cut = encode_words(tokenizer, words, int(firsts[2]) + 2)
    assert (cut.firsts[0] < 0).tolist() == [False, False, True, True]
    assert (cut.num_cut, cut.longest, len(cut.tokens[1])) == (1, len(encoded.tokens[0]) + 2, 0)
    long, short = "a long text about cats and dogs that see birds", "cats"
    whole, pair = encode_rows(tokenizer, [(long, short)], 999), encode_rows(tokenizer, [(long, short)], 12)
    tail = encode_rows(tokenizer, [(short,)], 999).tokens[0]
    assert len(pair.tokens[0]) == 10
    assert pair.tokens[0][-len(tail) - 1 :].tolist() == [tokenizer.sep_id, *tail], "the longer text loses tokens"
    assert (pair.num_cut, pair.longest) == (1, len(whole.tokens[0]) + 2)


def one(**row: object) -> list[dict[str, object]]:
    return [{"text": f"text {n}", "label": "ab"[n % 2], **row} for n in range(4)]


WRONG: dict[str, tuple[list[dict[str, object]], str]] = {
    "one class": (one(label="a"), r"finetune.label_column: all 3 rows have the label 'a'"),
    "no text": (one(text=" "), r"finetune.text_column: every text of column 'text' is empty"),
    "null text": (one(text=None), r"train, row 1: column 'text' has no text \(None\)"),
    "null label": (one(label=None), r"train, row 1: column 'label' has no label"),
    "no label column": ([{"text": "a", "kind": "b"}], r"finetune.label_column"),
    "no text column": ([{"body": "a", "label": "b"}], r"finetune.text_column"),
    "integers": (
        [{"text": "a", "label": number} for number in range(60)],
        r"finetune.kind: auto, but the label column holds \d+ different integers .* write classification or regression",
    ),
    "tags": (
        [{"tokens": ["a", "b"], "tags": ["B-x"]}] * 3,
        r"train, row 1: 2 words in 'tokens', but 1 labels in 'tags'",
    ),
    "no BIO": (
        [{"tokens": ["a", "b"], "tags": ["B-x", "S-x"]}] * 3,
        r"finetune.label_column: 'S-x' is no tag of the BIO scheme",
    ),
    "integer tags": ([{"tokens": ["a"], "tags": [1]}] * 3, r"finetune.labels: the tags are integers"),
    "labels": ([{"tokens": ["a"], "tags": "B-x"}] * 3, r"label 'B-x' is not a list of texts or integers"),
    "mixed": ([*one(), {"text": "x", "label": ["a"]}], r"label 'a' is not a list of texts or integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_cannot_be_learned_from_are_named(labelled: Labelled, tmp_path: Path, name: str) -> None:
    rows, message = WRONG[name]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        finetune(labelled(tmp_path / "run", f"dataset.path={file}", "dataset.eval_samples=1"))
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_label_that_training_lacks_is_named(labelled: Labelled, tmp_path: Path) -> None:
    for split, labels in (("train", "abab"), ("dev", "abc")):
        rows = [json.dumps({"text": "a text", "label": label}) + "\n" for label in labels]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    keys = (f"dataset.path={tmp_path}/*.jsonl", "dataset.eval_samples=null", "trainer.max_steps=1")
    with pytest.raises(DataError, match=r"dev, row 3: label 'c' is none of the labels of the training data \(a, b\)"):
        finetune(labelled(tmp_path / "run", *keys))
    finetune(labelled(tmp_path / "run", *keys, "finetune.labels=[a, b, c]"))
    with pytest.raises(DataError, match=r"train, row 2: label 'b' is none of finetune.labels \(a, c\)"):
        finetune(labelled(tmp_path / "other", *keys, "finetune.labels=[a, c]"))


def test_texts_that_are_too_long_are_cut_and_counted(
    labelled: Labelled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(labelled(tmp_path / "run", "dataset.max_seq_length=6", "trainer.max_steps=1"))
    said = capsys.readouterr().out
    assert "72 of 72 training texts are longer than dataset.max_seq_length = 6 tokens and are cut" in said


def test_another_task_and_another_start_are_refused(
    labelled: Labelled, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match=r"task: pretraining is for `neobert pretrain`"):
        finetune(tiny(tmp_path / "x"))
    with pytest.raises(StartupError, match=r"finetune.model: .*nowhere is no folder"):
        finetune(labelled(tmp_path / "x", f"finetune.model={tmp_path}/nowhere"))
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=1"))
    with pytest.raises(StartupError, match=r"task +fixed +"):
        finetune(labelled(tmp_path / "run", "trainer.resume_from_checkpoint=latest"))


@pytest.mark.parametrize("score", ["n/a", "nan"])
def test_labels_of_evaluation_rows_are_checked(labelled: Labelled, tmp_path: Path, score: str) -> None:
    (tmp_path / "rows").mkdir()
    train = [{"text": f"a {n}", "score": n / 3} for n in range(12)]
    for name, rows in (("train", train), ("validation", [*train[:3], {"text": "x", "score": score}])):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"validation, row 4: label '{score}' is not a number"):
        finetune(labelled(tmp_path / "out", f"dataset.path={tmp_path}/rows", "dataset.eval_samples=null"))


def test_weights_of_classes_are_refused_where_the_labels_are_none() -> None:
    with pytest.raises(DataError, match=r"finetune.initial_score: has no effect with finetune.kind: classification"):
        choose_initial_score(1.0, "classification", ["a"])
    with pytest.raises(DataError, match=r"finetune.class_weights: has no effect with finetune.kind: multilabel"):
        choose_weights("balanced", "multilabel", ("a", "b"), [["a"], ["b", "a"]])


def test_predictions_beside_an_average_are_those_of_the_weights(
    labelled: Labelled, labelled_files: Path, tmp_path: Path
) -> None:
    data = f"dataset.path={labelled_files}/numbers.jsonl"
    config = labelled(tmp_path / "run", data, "trainer.ema_decay=0.9", "trainer.max_steps=8")
    result = finetune(config)
    assert result.predictions is not None
    labels = np.array([row.label for row in read_splits(config).evaluation], dtype=np.float64)
    assert float(((result.predictions - labels) ** 2).mean()) == pytest.approx(result.metrics["loss"], rel=1e-4)
    averages = [line["loss"] for line in read_log(tmp_path / "run") if line["kind"] == "eval_ema"]
    assert averages
    assert result.metrics["loss"] != pytest.approx(averages[-1], rel=1e-4)


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_evaluation_that_is_not_finite_is_never_the_best() -> None:
    scores = [(2.0, float("nan")), (3.0, 0.5), (1.0, 0.4)]
    lines = [{"step": step, "loss": loss, "metrics": {"mcc": mcc}} for step, (loss, mcc) in enumerate(scores, 1)]
    assert choose_best_line(lines, None) == choose_best_line(lines, "mcc") == lines[1]
    assert choose_best_line(lines, "loss") == lines[2]
    assert choose_best_line(lines, "accuracy") is None
    lines[2]["loss"] = None  # It was not finite.
    assert choose_best_line(lines, "loss") == lines[0]
    assert choose_best_line(lines, "mcc") == lines[1]
    lines[1]["metrics"]["mcc"] = None
    assert choose_best_line(lines, "mcc") == lines[2]
