"""Metrics: by hand, and against scikit-learn, scipy and seqeval where they are installed."""

import numpy as np
import pytest

from neobert.errors import DataError
from neobert.finetune.scores import METRICS, entities, entity_f1, f1, macro_f1, mcc, micro_f1


def test_metrics_by_hand() -> None:
    predictions, labels = np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1])
    assert METRICS["accuracy"](predictions, labels) == 0.75
    assert f1(predictions, labels) == pytest.approx(0.8)  # Precision 2/3, recall 1.
    assert macro_f1(predictions, labels) == pytest.approx((0.8 + 2 / 3) / 2)
    assert mcc(predictions, labels) == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1))
    assert METRICS["pearson"](np.array([0.0, 1, 2]), np.array([1.0, 3, 5])) == pytest.approx(1)


def test_labels_of_one_class_have_no_correlation() -> None:
    assert mcc(np.ones(4, dtype=int), np.array([1, 0, 0, 1])) == 0
    assert METRICS["pearson"](np.ones(3), np.arange(3.0)) == 0


def test_several_labels_an_example() -> None:
    predictions, labels = np.array([[1, 0, 1], [0, 1, 0]]), np.array([[1, 0, 0], [0, 1, 0]])
    assert METRICS["accuracy"](predictions, labels) == 0.5
    assert micro_f1(predictions, labels) == pytest.approx(0.8)
    assert macro_f1(predictions, labels) == pytest.approx(2 / 3)


def test_f1_of_more_than_two_classes_names_the_alternatives() -> None:
    with pytest.raises(DataError, match=r"finetune\.metric: f1 .* macro_f1"):
        f1(np.array([0, 2]), np.array([0, 1]))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 2), ("LOC", 3, 4)}),
        (["B-PER", "B-PER"], {("PER", 0, 1), ("PER", 1, 2)}),
        (["O", "I-PER", "I-PER"], {("PER", 1, 3)}),
        (["B-PER", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 2)}),
        (["S-PER", "I-PER", "E-PER", "E-PER"], {("PER", 0, 1), ("PER", 1, 3), ("PER", 3, 4)}),
        (["B-a-b", "I-a-b"], {("a-b", 0, 2)}),
        ([], set()),
    ],
)
def test_entities(tags: list[str], expected: set[tuple[str, int, int]]) -> None:
    assert entities(tags) == expected


def test_entities_count_as_a_whole() -> None:
    labels = [["B-PER", "I-PER", "O"], ["B-LOC", "O"]]
    assert entity_f1(labels, labels) == 1
    assert entity_f1([["B-PER", "O", "O"], ["B-LOC", "O"]], labels) == 0.5
    assert entity_f1([["O"] * 3, ["O"] * 2], labels) == 0


def test_equal_to_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        predictions, labels = rng.integers(0, classes, (2, 50))
        assert mcc(predictions, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predictions))
        for average in ("macro", "micro"):
            expected = sklearn.f1_score(labels, predictions, average=average)
            assert METRICS[f"{average}_f1"](predictions, labels) == pytest.approx(expected)
    predictions, labels = rng.integers(0, 2, (2, 50))
    assert f1(predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions))
    predictions, labels = rng.integers(0, 2, (2, 50, 3))
    assert METRICS["accuracy"](predictions, labels) == sklearn.accuracy_score(labels, predictions)
    assert macro_f1(predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions, average="macro"))
    assert micro_f1(predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions, average="micro"))


def test_equal_to_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    predictions, labels = rng.normal(size=60), rng.integers(0, 6, 60).astype(np.float64)
    assert METRICS["pearson"](predictions, labels) == pytest.approx(stats.pearsonr(predictions, labels)[0])
    assert METRICS["spearman"](predictions, labels) == pytest.approx(stats.spearmanr(predictions, labels)[0])


def test_equal_to_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(0)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC"))]
    labels, predictions = ([[str(x) for x in rng.choice(tags, 7)] for _ in range(100)] for _ in range(2))
    assert entity_f1(predictions, labels) == pytest.approx(seqeval.f1_score(labels, predictions))
    plain = [[tag.replace("E-", "I-").replace("S-", "B-") for tag in row] for row in labels]
    assert 0 < entity_f1(plain, labels) == pytest.approx(seqeval.f1_score(labels, plain))
