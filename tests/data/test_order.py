import numpy as np
import pytest

from neobert.data.rows.order import Permutation, extend_keys, key, mask_hashes, step_seed, uniform, uniforms


def test_golden_values():
    """A change of these changes the data order of every run: raise the loader's version with it."""
    assert Permutation(1000003, key(42, 1, 0))(range(5)).tolist() == [154273, 688613, 773866, 581729, 74973]
    assert key(42, "documents", 0) == key(42, 1, 0)
    assert key(42, "masks", 7) == 832189726401682030
    assert mask_hashes(np.array([1], dtype=np.uint64), [0, 1]).tolist() == [10451216379200822465, 13757245211066428519]
    assert step_seed(0, 10, 1) == 4919843788680211413
    assert uniform(key(3)) == pytest.approx(0.09792003995383725, abs=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 255, 256, 257, 1000])
def test_permutation_is_a_bijection(n):
    assert sorted(Permutation(n, key(n, 1))(np.arange(n)).tolist()) == list(range(n))


def test_permutation_of_no_items():
    assert Permutation(0, key(1))([]).tolist() == []


def test_neighbours_are_independent():
    image = Permutation(1_000_003, key(1, 2))(np.arange(20_000))
    assert abs(np.mean(image[1:] % 2 != image[:-1] % 2) - 0.5) < 0.02
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.03
    assert abs(image.mean() / 1_000_003 - 0.5) < 0.02


def test_keys_are_hashed_not_added():
    assert key(1, 2) != key(2, 1)
    assert key(5 + 1, "rows", 0) != key(5, "rows", 1)
    with pytest.raises(KeyError):
        key(1, "no such tag")


def test_extend_keys_equals_key():
    assert extend_keys(key(4, "masks"), [0, 9, -1]).tolist() == [key(4, "masks", n) for n in (0, 9, -1)]


def test_uniforms_are_uniform():
    values = uniforms(extend_keys(key(1), np.arange(20_000)))
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert abs(np.histogram(values, bins=10, range=(0, 1))[0] - 2000).max() < 200
