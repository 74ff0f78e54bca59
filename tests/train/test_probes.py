"""Probes while training: what they say, what they cost, and that the training has the bits it has without them."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from children import run_in_two
from records import exact_steps, log_lines
from safetensors.torch import load_file
from small_corpus import OBJECTS, SUBJECTS, VERBS

from neobert import load
from neobert.cli import EXIT_CODES
from neobert.config.schema import Config, TokenizerSection
from neobert.correlation import spearman
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import DataError
from neobert.train.loop import pretrain
from neobert.train.probes import loss_bands, probing
from neobert.train.probes.frozen_states import PENALTY, knn_accuracy, ridge_accuracy
from neobert.train.probes.labelled_sets import ProbeSet, load_probe_set, name_sets

Tiny = Callable[..., Config]
SETTINGS = ["trainer.ema_decay=0.8", "model.dropout_prob=0.1"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Texts labelled with their verb, and scored pairs as CSV."""
    folder, rng = tmp_path_factory.mktemp("sets"), random.Random(2)
    rows = []
    for number in range(60):
        verb = VERBS[number % 2]
        rows.append({"text": f"{rng.choice(SUBJECTS)} {verb} {rng.choice(OBJECTS)} {number}.", "label": verb})
    (folder / "verbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{rng.choice(SUBJECTS)} {n},{rng.choice(SUBJECTS)} sees {n},{n % 6}" for n in range(30)]
    (folder / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]) + "\n")
    return folder / "verbs.jsonl", folder / "pairs.csv"


def probing_with(sets: tuple[Path, Path], *more: str) -> list[str]:
    return [*SETTINGS, "trainer.probe_steps=3", f"trainer.probe_sets=[{sets[0]}, {sets[1]}]", *more]


@pytest.fixture(scope="module")
def probed(tiny: Tiny, sets: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "run"
    pretrain(tiny(out, *probing_with(sets)))
    return out


def without_cost(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{name: x for name, x in line.items() if name not in ("seconds", "fractions")} for line in lines]


def test_the_training_has_the_bits_it_has_without_probes(tiny: Tiny, probed: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    pretrain(tiny(out, *SETTINGS))
    assert exact_steps(out) == exact_steps(probed)
    for file in ("model", "ema"):
        one, other = (load_file(run / "checkpoints" / "12" / f"{file}.safetensors") for run in (out, probed))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [x["loss"] for x in log_lines(out, "eval")] == [x["loss"] for x in log_lines(probed, "eval")]
    assert not log_lines(out, "probe")


def test_what_is_recorded(probed: Path, sets: tuple[Path, Path]) -> None:
    lines, averaged = log_lines(probed, "probe"), log_lines(probed, "probe_ema")
    assert [line["step"] for line in lines] == [line["step"] for line in averaged] == [0, 3, 6, 9, 12]
    assert averaged[-1]["sets"] != lines[-1]["sets"] or averaged[-1]["losses"] != lines[-1]["losses"]
    verbs, pairs = (f"{file.parent.name}/{file.stem}" for file in sets)
    last = lines[-1]
    assert set(last["sets"]) == set(last["fingerprints"]) == {verbs, pairs}
    assert last["sets"][verbs].keys() == {"knn", "ridge"}
    assert last["sets"][pairs].keys() == {"spearman"}
    assert set(last["seconds"]) == set(last["fractions"]) == {verbs, pairs, "losses"}
    assert not lines[0]["fractions"]
    assert len({line["fingerprints"][verbs] for line in lines}) == 1
    text = (probed / "training.log").read_text()
    assert f"probe     {verbs}: 60 texts of 2 classes (the largest has 50.0%) of 60 rows, sha256:" in text
    assert "probe step      12 | " in text
    assert "probe ema step      12 | " in text


def test_the_vectors_are_those_of_embed(probed: Path, sets: tuple[Path, Path]) -> None:
    model, rows = load(probed, device="cpu"), [json.loads(line) for line in sets[0].read_text().splitlines()]
    vectors = model.embed([row["text"] for row in rows]).numpy()
    classes = np.unique([row["label"] for row in rows], return_inverse=True)[1]
    found = log_lines(probed, "probe")[-1]["sets"]
    verbs, pairs = (f"{file.parent.name}/{file.stem}" for file in sets)
    assert found[verbs]["ridge"] == pytest.approx(ridge_accuracy(vectors, classes), abs=0.02)
    assert found[verbs]["knn"] == pytest.approx(knn_accuracy(vectors, classes), abs=0.02)
    lines = [line.split(",") for line in sets[1].read_text().splitlines()[1:]]
    first, second = (model.embed([line[n] for line in lines], normalize=True).numpy() for n in (0, 1))
    scores = np.array([float(line[2]) for line in lines])
    assert found[pairs]["spearman"] == pytest.approx(spearman((first * second).sum(axis=1), scores), abs=1e-3)


@pytest.mark.parametrize("objective", ["mlm", "replaced_token"])
def test_the_parts_of_the_loss_add_up_to_that_of_the_evaluation(
    tiny: Tiny, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(loss_bands, "RANKS", (5, 40))
    monkeypatch.setattr(loss_bands, "FUNCTION_WORDS", 3)
    pretrain(tiny(out, f"trainer.objective={objective}", "trainer.max_steps=2", "trainer.probe_steps=2"))
    (evaluated,) = [line for line in log_lines(out, "eval") if line["step"] == 2]
    (probe,) = [line for line in log_lines(out, "probe") if line["step"] == 2]
    assert set(probe["losses"]) == {"frequency", "position", "word_class"}
    for name, losses in probe["losses"].items():
        counts = probe["targets"][name]
        assert len(losses) > 1
        assert sum(counts.values()) == evaluated["num_targets"]
        total = sum(losses[band] * counts[band] for band in losses)
        assert total / evaluated["num_targets"] == pytest.approx(evaluated["loss"], rel=1e-5)


def test_a_resumed_run_has_the_probes_of_the_uninterrupted_one(
    tiny: Tiny, probed: Path, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, *probing_with(sets), f"trainer.resume_from_checkpoint={probed / 'checkpoints' / '8'}"))
    expected = [line for line in without_cost(log_lines(probed, "probe")) if line["step"] > 8]
    assert without_cost(log_lines(out, "probe")) == expected
    again = tiny(out, *probing_with(sets), "trainer.resume_from_checkpoint=latest")
    pretrain(again)
    assert [line["step"] for line in log_lines(out, "probe")] == [9, 12], "what is in the log is not made again"


def test_two_processes_split_the_probes(tiny: Tiny, probed: Path, sets: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", *probing_with(sets), "trainer.max_steps=3", "trainer.per_device_train_batch_size=2")
    run_in_two(lambda: EXIT_CODES[pretrain(config).reason], tmp_path)
    one, two = (log_lines(run, "probe") for run in (probed, tmp_path / "run"))
    assert [line["targets"] for line in two] == [line["targets"] for line in one[:2]]
    assert two[0]["fingerprints"] == one[0]["fingerprints"]
    for name, losses in one[0]["losses"].items():
        assert two[0]["losses"][name] == pytest.approx(losses, abs=1e-5)
    for name, found in one[0]["sets"].items():
        assert two[0]["sets"][name] == pytest.approx(found, abs=0.04), "a text or two on the border"


def test_compiled_blocks_train_the_same(tiny: Tiny, sets: tuple[Path, Path], tmp_path: Path) -> None:
    compiled = ["trainer.torch_compile=true", "trainer.torch_compile_backend=eager", "trainer.max_steps=2"]
    compiled.append("dataset.eval_samples=null")
    pretrain(tiny(tmp_path / "plain", *SETTINGS, *compiled))
    pretrain(tiny(tmp_path / "probed", *probing_with(sets), *compiled, "trainer.probe_steps=1"))
    assert exact_steps(tmp_path / "plain") == exact_steps(tmp_path / "probed")
    assert len(log_lines(tmp_path / "probed", "probe")) == 3


def test_an_expensive_probe_is_named_once(
    tiny: Tiny, sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "MOST_OF_RUN", 0.0)
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=2", "trainer.probe_steps=1", f"trainer.probe_sets=[{sets[1]}]"))
    warned = [line for line in (out / "training.log").read_text().splitlines() if "warning: the probe" in line]
    assert len(warned) == 2
    assert "trainer.probe_steps, or lower trainer.probe_examples" in warned[0]
    assert "the probe losses took" in warned[1]
    assert "lower trainer.probe_tokens" in warned[1]


def test_vectors_that_are_not_finite_are_no_result(
    tiny: Tiny, sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        probing, "_embed", lambda runtime, model, documents: np.full((len(documents), 32), np.nan, np.float32)
    )
    monkeypatch.setattr(probing, "measure", lambda bands, module, losses: np.stack([np.full(13, np.nan), np.ones(13)]))
    out = tmp_path / "run"
    pretrain(tiny(out, *probing_with(sets), "trainer.max_steps=1"))
    (line,) = [line for line in log_lines(out, "probe") if line["step"] == 1]
    assert {value for found in line["sets"].values() for value in found.values()} == {None}
    assert {value for found in line["losses"].values() for value in found.values()} == {None}


def test_nothing_to_probe_and_unusable_sets_stop_the_start(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trainer\.probe_steps: 2, but there is nothing to probe"):
        pretrain(tiny(tmp_path / "a", "trainer.probe_steps=2", "dataset.eval_samples=null"))
    with pytest.raises(DataError, match=r"trainer\.probe_sets: .*none\.jsonl is no file"):
        pretrain(tiny(tmp_path / "b", "trainer.probe_steps=2", f"trainer.probe_sets=[{tmp_path / 'none.jsonl'}]"))
    assert not (tmp_path / "b" / "config.yaml").exists()


# ---- classifiers ----


def test_both_classifiers_leave_each_text_out() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(40) % 3
    vectors = (rng.normal(size=(40, 6)) + np.eye(6)[classes]).astype(np.float32)
    features = (vectors - vectors.mean(0)) / vectors.std(0)
    features = np.hstack([features, np.ones((40, 1))]).astype(np.float64)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ridge = knn = 0
    for left_out in range(40):
        others = np.arange(40) != left_out
        x, y = features[others], np.eye(3)[classes[others]]
        penalty = np.diag([PENALTY * 40] * 6 + [0.0])
        weights = np.linalg.solve(x.T @ x + penalty, x.T @ y)
        ridge += int(np.argmax(features[left_out] @ weights) == classes[left_out])
        cosines = units[others] @ units[left_out]
        nearest = np.argsort(-cosines)[:10]
        votes = np.bincount(classes[others][nearest], weights=1 + cosines[nearest], minlength=3)
        knn += int(np.argmax(votes) == classes[left_out])
    assert ridge_accuracy(vectors, classes) == ridge / 40
    assert knn_accuracy(vectors, classes) == knn / 40
    assert 0.4 < ridge / 40 < 1


def test_the_classifiers_are_those_of_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(1)
    classes = np.arange(60) % 2
    vectors = (rng.normal(size=(60, 5)) + 0.7 * classes[:, None]).astype(np.float32)
    features = (vectors - vectors.mean(0)) / vectors.std(0)
    predicted = cross_val_predict(RidgeClassifier(alpha=PENALTY * 60), features, classes, cv=LeaveOneOut())
    assert ridge_accuracy(vectors, classes) == np.mean(predicted == classes)
    # Votes that weigh alike; ties are rare, and the closest ones decide here.
    neighbours = KNeighborsClassifier(10, metric="cosine", weights=lambda distances: 2 - distances)
    assert knn_accuracy(vectors, classes) == np.mean(
        cross_val_predict(neighbours, vectors, classes, cv=LeaveOneOut()) == classes
    )


# ---- sets ----


def load_set(path: Path, tokenizer_folder: Path, *, most: int = 1000, seed: int = 0) -> ProbeSet:
    tokenizer = load_tokenizer(TokenizerSection(path=str(tokenizer_folder)))
    return load_probe_set(str(path), "name", tokenizer, most=most, seed=seed, max_length=16)


def test_the_sample_depends_on_texts_and_seed_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{"sentence": f"the cat sees {n} stones", "label": n % 3} for n in range(50)]
    shuffled = random.Random(1).sample(rows, 50)
    files = []
    for name, lines in (("a", rows), ("b", [*shuffled, *rows[:9], {"sentence": None, "label": 1}])):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in lines))
    one, other = (load_set(file, tokenizer_folder, most=20) for file in files)
    assert one.fingerprint == other.fingerprint
    assert one.num_rows == other.num_rows == 50, "a text counts once"
    assert all(np.array_equal(a, b) for a, b in zip(one.documents, other.documents, strict=True))
    assert len(one.documents) == 20
    assert max(map(len, one.documents)) <= 16
    assert load_set(files[0], tokenizer_folder, most=20, seed=1).fingerprint != one.fingerprint


def test_unusable_sets(tmp_path: Path, tokenizer_folder: Path) -> None:
    def write(rows: list[dict[str, object]]) -> Path:
        file = tmp_path / "set.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    texts = [f"text {n}" for n in range(12)]
    wrong = {
        r"has the columns words, tag; rename them to text and label": [{"words": x, "tag": 1} for x in texts],
        r"all examples of .* have the label 7": [{"text": x, "label": 7} for x in texts],
        r"has 4 examples .* at least 10": [{"text": x, "label": 1} for x in texts[:4]],
        r"the score 'high' in .* is no number": [{"sentence1": x, "sentence2": x, "score": "high"} for x in texts],
    }
    for message, rows in wrong.items():
        with pytest.raises(DataError, match=message):
            load_set(write(rows), tokenizer_folder)
    with pytest.raises(DataError, match=r"several files are called a/x"):
        name_sets(["/one/a/x.jsonl", "/two/a/x.csv"])


def test_classes_of_words() -> None:
    words = frozenset({"the", "über"})
    found = [
        loss_bands.CLASSES[loss_bands.classify_word(x, words)] for x in ("The", "Über", "cat", "x1", "1,5", "½", "...")
    ]
    assert found == ["function", "function", "content", "content", "number", "number", "punctuation"]
