"""`neobert adapt`: more tokens, two runs and a table, each step once; what cannot be adapted is refused before."""

import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import call
from safetensors.torch import load_file
from small_corpus import make_texts
from small_model import write_run

from neobert.cli import EXIT_CODES
from neobert.commands import adaptation_result, staged_run
from neobert.commands.adapt import AdaptRequest, check_start, check_typed
from neobert.config.load import load_config
from neobert.errors import StartupError
from neobert.inference.mlm_loss import LossSettings
from neobert.inference.model import load
from neobert.train.loop import pretrain
from neobert.weights.encoder_weights import load_encoder_weights

WORDS = ["myocardial", "infarction", "tachycardia", "stenosis", "the", "patient", "with", "a"]
STEPS = [
    *("--trainer.max_steps", "4", "--dataset.max_seq_length", "40", "--trainer.per_device_train_batch_size", "4"),
    *("--trainer.mixed_precision", "no", "--trainer.torch_compile", "false", "--trainer.use_cpu", "true"),
    *("--optimizer.lr", "1e-2", "--trainer.save_steps", "2"),
]


def write_texts(file: Path, texts: Sequence[str]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands of stages, which run in this process."""
    called: list[str] = []

    def run(words: Sequence[str]) -> int:
        called.append(Path(words[words.index("pretrain") + 1]).name)
        return EXIT_CODES[pretrain(load_config(words[4], words[5:])).reason]

    monkeypatch.setattr(staged_run, "run_command", run)
    return called


def test_a_model_is_adapted_once(
    tmp_path: Path, tokenizer_folder: Path, commands: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = write_run(tmp_path / "run", tokenizer_folder, max_position_embeddings=96), tmp_path / "new"
    rng = random.Random(0)
    own = write_texts(tmp_path / "own.jsonl", [" ".join(rng.choices(WORDS, k=30)) for _ in range(40)])
    general = tmp_path / "general"
    write_texts(general / "train.jsonl", make_texts(40, seed=1))
    write_texts(general / "validation.jsonl", make_texts(9, seed=2))
    probes = tmp_path / "probe.jsonl"
    probes.write_text(
        "".join(json.dumps({"text": f"{t} {n}", "label": n % 2}) + "\n" for n, t in enumerate(make_texts(12)))
    )
    words = [
        *(str(model), "--text", own, "--general", str(general), "--output", str(output), "--new-tokens", "30"),
        *("--held-out", "5", "--general-held-out", "4", "--embedding-steps", "3", "--piece-chars", "60"),
        *("--probe-sets", str(probes), *STEPS),
    ]
    # What cannot be measured is said before anything is trained.
    assert call("pretraining/adapt.py", *words, "--piece-chars", "500") == 2
    assert "--piece-chars: 500 characters have" in capsys.readouterr().err
    assert commands == []
    assert call("pretraining/adapt.py", *words) == 0
    table = capsys.readouterr().out
    assert "tokens a word" in table

    old, extended = load_encoder_weights(model), load_encoder_weights(output / "extended")
    assert torch.equal(
        extended.tensors["encoder.embedding.weight"][:360], old.tensors["encoder.embedding.weight"][:360]
    ), "old rows are as they were"
    first, second = (load_file(output / name / "checkpoints" / n / "model.safetensors") for name, n in STAGES)
    changed = {name for name in first if not torch.equal(first[name], extended.tensors[name])}
    assert changed == {"encoder.embedding.weight"}, "embeddings first"
    assert all(not torch.equal(second[name], first[name]) for name in first), "then everything"

    held_out = [json.loads(line)["text"] for line in (output / "held_out" / "own.jsonl").read_text().splitlines()]
    assert held_out == [json.loads(line)["text"] for line in Path(own).read_text().splitlines()][:5]
    config = load_config(output / "training" / "config.yaml")
    assert [(source.split, source.weight) for source in config.dataset.mixture] == [("train[5:]", 0.5), ("train", 0.5)]
    assert config.dataset.mixture_alpha == 0

    result = json.loads((output / "result.json").read_text())
    own_result, general_result = result["texts"]["own"], result["texts"]["general"]
    assert own_result["extended"]["tokens_per_word"] < 0.7 * own_result["before"]["tokens_per_word"]
    assert own_result["after"]["nats_per_byte"] < own_result["extended"]["nats_per_byte"]
    assert len({text["num_words"] for text in own_result.values()}) == 1, "the same words for every model"
    assert general_result["before"].keys() == own_result["after"].keys()
    assert result["probes"].keys() == {"before", "extended", "after"}
    assert load(output / "training").fill_mask(["the [MASK]"])

    # A second time nothing is made again; a killed run is continued.
    commands.clear()
    capsys.readouterr()
    assert call("pretraining/adapt.py", *words) == 0
    assert commands == []
    assert capsys.readouterr().out.endswith(table.splitlines()[-1] + "\n")
    shutil.rmtree(output / "training" / "checkpoints" / "4")
    assert call("pretraining/adapt.py", *words) == 0
    assert commands == ["continue"]
    again = load_file(output / "training" / "checkpoints" / "4" / "model.safetensors")
    assert all(torch.equal(again[name], second[name]) for name in second)

    # Other arguments are another adaptation.
    assert call("pretraining/adapt.py", *words, "--init", "random") == 2
    assert "init was 'fvt' and is 'random'" in capsys.readouterr().err


STAGES = [("embeddings", "3"), ("training", "4")]


@pytest.mark.parametrize(
    "key", ["dataset.text_column=body", "--dataset.eval_split=x", "tokenizer.train=true", "seed=3"]
)
def test_a_key_that_an_adaptation_decides_is_refused(key: str) -> None:
    name = key.removeprefix("--").partition("=")[0]
    with pytest.raises(StartupError, match=rf"^{re.escape(name)}: an adaptation decides it"):
        check_typed(["optimizer.lr=1e-4", key])
    check_typed(["optimizer.lr=1e-4", "--dataset.sample_by", "document"])


def test_other_weights_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model, made = Path(write_texts(tmp_path / "in" / "own.jsonl", ["a b"])), tmp_path / "model", []
    model.mkdir()
    monkeypatch.setattr(adaptation_result, "load_scorer", lambda path: None)
    monkeypatch.setattr(
        adaptation_result,
        "measure_mlm_loss",
        lambda scorer, texts, settings, file: (made.append(file), file.write_text("{}")),
    )
    for weights in (b"1", b"2", b"2"):
        (model / "model.safetensors").write_bytes(weights)
        adaptation_result._measure_loss(model, text, LossSettings(whole_words=True), tmp_path, "after")
    assert len(made) == 2


def test_model_and_tokenizer_belong_together(tmp_path: Path, tokenizer_folder: Path) -> None:
    weights = load_encoder_weights(write_run(tmp_path / "run", tokenizer_folder))
    request = AdaptRequest(model="run", text=("own.jsonl",))
    other = replace(weights, config=replace(weights.config, vocab_size=300))
    with pytest.raises(StartupError, match=r"its tokenizer has 360 tokens and its embedding 300 rows.*belong together"):
        check_start(request, other)
    with pytest.raises(StartupError, match=r"run has no tokenizer.json"):
        check_start(request, replace(weights, tokenizer=None))
