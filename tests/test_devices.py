"""`NEOBERT_TEST_DEVICE` decides where the runs of the tests train."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import DEVICE, KEYS, choose_test_device

from neobert.config.load import parse_config
from neobert.config.schema import Config
from neobert.train.hardware.device import choose_device_type


def test_runs_of_the_tests_train_on_the_device(tiny: Callable[..., Config], tmp_path: Path) -> None:
    assert choose_device_type(tiny(tmp_path)) == DEVICE


def test_each_device_has_its_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, keys in KEYS.items():
        config = parse_config("dataset: {path: x}\ntokenizer: {path: x}\ntrainer: {max_steps: 1}\n", keys)
        assert choose_device_type(config) == device == choose_test_device(device)


def test_a_device_that_is_not_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="NEOBERT_TEST_DEVICE: cuda, but torch sees no GPU; unset it"):
        choose_test_device("cuda")
    with pytest.raises(pytest.UsageError, match="NEOBERT_TEST_DEVICE: 'tpu' is unknown; write cpu or cuda"):
        choose_test_device("tpu")
