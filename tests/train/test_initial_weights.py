"""`model.init_from`: a fresh run starts from the weights of another model, of the same architecture, or not at all."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from records import log_lines
from safetensors.torch import load_file, save_file
from small_corpus import make_texts

from neobert.config.load import ConfigError, config_to_yaml, load_config, parse_config
from neobert.config.schema import Config, ModelSection
from neobert.data.tokenizer import train_tokenizer
from neobert.errors import StartupError
from neobert.model.config import ARCHITECTURE
from neobert.train.loop import pretrain
from neobert.train.run import build_run
from neobert.train.start import release_lock

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def source(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "run"
    pretrain(tiny(out, "trainer.max_steps=6", "trainer.save_steps=0", "trainer.eval_steps=0"))
    return out


def first_evaluation(run: Path) -> float:
    return log_lines(run, "eval")[0]["loss"]


def test_a_run_starts_where_the_other_one_ended(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, f"model.init_from={source}", "trainer.max_steps=1", "seed=4"))
    assert log_lines(out, "eval")[0]["step"] == 0
    assert first_evaluation(out) == pytest.approx(log_lines(source, "eval")[-1]["loss"], abs=1e-6)
    said = (out / "training.log").read_text()
    assert f"initial weights from {source}/checkpoints/6 (checkpoint layout after 6 steps)" in said
    assert "the tokenizer is the same" in said
    assert log_lines(out, "step")[0]["step"] == 1, "the step starts again"


def test_a_resumed_run_does_not_start_over(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    out, init = tmp_path / "run", f"model.init_from={source}"
    pretrain(tiny(out, init, "trainer.max_steps=2"))
    weights = load_file(out / "checkpoints" / "2" / "model.safetensors")
    (out / "log.jsonl").rename(out / "first.jsonl")
    pretrain(tiny(out, init, "trainer.max_steps=3", "trainer.resume_from_checkpoint=latest", "optimizer.lr=1e-12"))
    after = load_file(out / "checkpoints" / "3" / "model.safetensors")
    assert all(torch.allclose(after[name], weights[name], atol=1e-6) for name in weights)


def test_every_difference_of_architecture_is_named_before_the_data_is_touched(
    tiny: Tiny, tmp_path: Path, source: Path
) -> None:
    bad = ["model.num_hidden_layers=1", "model.rms_norm=false", "model.intermediate_size=100", "dataset.path=/nowhere"]
    with pytest.raises(StartupError) as caught:
        pretrain(tiny(tmp_path / "run", f"model.init_from={source}", *bad))
    message = str(caught.value)
    assert "model.num_hidden_layers: the config has 1, " in message
    assert f"{source} has 2" in message
    assert "model.rms_norm: the config has False" in message
    assert "model.intermediate_size: the config has 100" in message
    assert not (tmp_path / "run" / "config.yaml").exists()


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")


def without_sizes(config: Config, *overrides: str) -> Config:
    """The config again, from a file in which the keys of the architecture are missing."""
    tree = yaml.safe_load(config_to_yaml(config))
    tree["model"] = {key: value for key, value in tree["model"].items() if key not in ARCHITECTURE}
    return parse_config(yaml.safe_dump(tree), overrides)


def saved_architecture(run: Path, step: int) -> tuple[list[int], list[int]]:
    """Sizes in config.yaml and in a checkpoint's model_config.json."""
    config = load_config(run / "config.yaml")
    model = json.loads((run / "checkpoints" / str(step) / "model_config.json").read_text())
    return [getattr(config.model, name) for name in SIZES], [model[name] for name in SIZES]


def test_keys_that_are_not_set_are_the_sources(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    out, init = tmp_path / "run", f"model.init_from={source}"
    config = without_sizes(tiny(out), init, "trainer.max_steps=1")
    assert config.model.hidden_size == 768, "nothing is read when a config is loaded"
    pretrain(config)
    assert saved_architecture(out, 1) == ([32, 2, 2, 48, 64], [32, 2, 2, 48, 64])
    assert first_evaluation(out) == pytest.approx(log_lines(source, "eval")[-1]["loss"], abs=1e-6)
    assert "hidden_size=32" in (out / "training.log").read_text()
    # The same file resumes, with the source gone; so does the saved one.
    resume = "trainer.resume_from_checkpoint=latest"
    pretrain(without_sizes(tiny(out), "model.init_from=/nowhere", resume, "trainer.max_steps=2"))
    pretrain(load_config(out / "config.yaml", [resume, "trainer.max_steps=3"]))
    assert saved_architecture(out, 3) == ([32, 2, 2, 48, 64], [32, 2, 2, 48, 64])


def test_a_key_that_is_set_at_its_default_contradicts_too(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    init = f"model.init_from={source}"
    with pytest.raises(StartupError) as caught:
        pretrain(without_sizes(tiny(tmp_path / "run"), init, "model.hidden_size=768", "model.rope=true"))
    assert f"model.hidden_size: the config has 768, {source} has 32" in str(caught.value)
    assert "remove these keys" in str(caught.value)
    assert "num_hidden_layers" not in str(caught.value)
    in_python = replace(
        tiny(tmp_path / "b"), model=ModelSection(init_from=str(source), hidden_size=48), explicit=frozenset()
    )
    with pytest.raises(StartupError, match=r"model.hidden_size: the config has 48, "):
        pretrain(in_python)


def test_rules_about_the_architecture_wait_for_the_source(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    init, long = f"model.init_from={source}", "dataset.max_seq_length=2048"
    with pytest.raises(ConfigError, match=r"model.max_position_embeddings: 1024 is less than dataset.max_seq_length"):
        without_sizes(tiny(tmp_path / "run"), long)
    config = without_sizes(tiny(tmp_path / "run"), init, long, "dataset.path=/nowhere")
    with pytest.raises(StartupError) as caught:
        pretrain(config)
    assert f"the config does not fit model.init_from: {source}:" in str(caught.value)
    assert "model.max_position_embeddings: 64 is less than dataset.max_seq_length = 2048" in str(caught.value)
    longer = without_sizes(tiny(tmp_path / "longer"), init, "dataset.max_seq_length=96", "trainer.max_steps=1")
    pretrain(replace(longer, model=replace(longer.model, max_position_embeddings=96)))
    assert saved_architecture(tmp_path / "longer", 1)[1][-1] == 96, "rotary positions may be more"


def test_a_larger_model_needs_its_larger_sizes_alone(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "run"
    tile = [f"model.init_from={source}", "model.init_tile=true", "model.num_hidden_layers=3", "trainer.max_steps=1"]
    pretrain(without_sizes(tiny(out), *tile))
    assert saved_architecture(out, 1)[1] == [32, 3, 2, 48, 64]


def test_what_shapes_nothing_may_differ(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    free = ["model.dropout_prob=0.1", "model.intermediate_size=47", "model.max_position_embeddings=256"]
    pretrain(tiny(tmp_path / "run", f"model.init_from={source}", "trainer.max_steps=1", *free))


def test_a_wrong_path_is_an_error_that_names_the_key(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"model.init_from: /nowhere is no folder"):
        pretrain(tiny(tmp_path / "run", "model.init_from=/nowhere"))
    with pytest.raises(ConfigError, match=r"model.init_drop_decoder_bias: true has no effect without model.init_from"):
        tiny(tmp_path / "run", "model.init_drop_decoder_bias=true")


def test_with_another_tokenizer_embeddings_follow_the_text_of_the_tokens(
    tiny: Tiny, tmp_path: Path, source: Path
) -> None:
    theirs = json.loads((source / "checkpoints" / "6" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    folder = tmp_path / "tokenizer"
    train_tokenizer(iter(make_texts(40, seed=5)), algorithm="byte_bpe", vocab_size=330).save(folder)
    ours = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    shared = set(ours) & set(theirs)
    assert 270 < len(shared) < 330
    out = tmp_path / "run"
    still = ["trainer.max_steps=1", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    pretrain(tiny(out, f"model.init_from={source}", f"tokenizer.path={folder}", *still))
    assert f"{len(shared)} tokens are copied, {330 - len(shared)} tokens" in (out / "training.log").read_text()
    old = load_file(source / "checkpoints" / "6" / "model.safetensors")
    new = load_file(out / "checkpoints" / "1" / "model.safetensors")
    before, after = old["encoder.embedding.weight"], new["encoder.embedding.weight"]
    for token in shared:
        assert torch.allclose(after[ours[token]], before[theirs[token]], atol=1e-6)
    mean = torch.stack([before[theirs[token]] for token in shared]).mean(0)
    unknown = next(token for token in ours if token not in shared)
    assert torch.allclose(after[ours[unknown]], mean, atol=1e-5)
    assert torch.allclose(after[-1], mean, atol=1e-5), "rows beyond the tokenizer too"
    assert torch.allclose(new["encoder.norm.weight"], old["encoder.norm.weight"], atol=1e-6)


def test_a_bias_is_copied_or_left_out(tiny: Tiny, tmp_path: Path) -> None:
    biased, copied, left = (tmp_path / name for name in ("biased", "copied", "left"))
    short = ["trainer.max_steps=2", "trainer.eval_steps=0", "trainer.save_steps=0"]
    pretrain(tiny(biased, *short, "model.decoder_bias=true"))
    init = f"model.init_from={biased}"
    with pytest.raises(StartupError, match=r"model.decoder_bias: the config has False, .* has True"):
        pretrain(tiny(tmp_path / "refused", init))
    still = [init, "trainer.max_steps=1", "optimizer.lr=1e-12"]
    pretrain(tiny(copied, *still, "model.decoder_bias=true"))
    pretrain(tiny(left, *still, "model.init_drop_decoder_bias=true"))
    first = load_file(biased / "checkpoints" / "2" / "model.safetensors")
    second, third = (load_file(run / "checkpoints" / "1" / "model.safetensors") for run in (copied, left))
    assert first["decoder_bias"].any()
    assert torch.allclose(second["decoder_bias"], first["decoder_bias"], atol=1e-6)
    assert set(third) == set(first) - {"decoder_bias"}


def test_a_run_starts_at_the_loss_of_token_frequencies(tiny: Tiny, tmp_path: Path) -> None:
    frequent, small = "model.decoder_bias_init=log_frequency", "model.embedding_init_range=0.002"
    biased = tiny(tmp_path / "biased", "model.decoder_bias=true", small, frequent, "trainer.max_steps=2")
    run = build_run(biased)
    counts = run.data.token_counts
    bias = run.module.decoder_bias.detach()
    assert bias.exp().sum() == pytest.approx(1, abs=1e-5)
    often, never = int(counts.argmax()), int(counts.argmin())
    assert counts[never] == 0
    assert float(bias[often] - bias[never]) == pytest.approx(math.log(counts[often] + 1), abs=1e-4)
    release_lock(tmp_path / "biased")
    pretrain(biased)
    plain = tmp_path / "plain"
    pretrain(tiny(plain, "model.decoder_bias=true", small, "trainer.max_steps=2"))
    expected = -float(counts @ bias[: len(counts)].numpy()) / counts.sum()
    assert expected == pytest.approx(run.data.unigram_entropy(), abs=0.15), "of few tokens"
    assert first_evaluation(tmp_path / "biased") == pytest.approx(expected, abs=0.1)
    assert first_evaluation(plain) == pytest.approx(math.log(len(bias)), abs=0.01)
    assert math.log(len(bias)) > expected + 1, "else there is no difference to see"
    assert "starts at log frequencies, of 3,669 tokens" in (tmp_path / "biased" / "training.log").read_text()


def test_frequencies_are_the_start_of_fresh_runs_with_a_bias_alone(tiny: Tiny, tmp_path: Path) -> None:
    frequent = "model.decoder_bias_init=log_frequency"
    with pytest.raises(ConfigError, match=r"model.decoder_bias_init: log_frequency has no effect without model.decod"):
        tiny(tmp_path / "run", frequent)
    with pytest.raises(ConfigError, match=r"decoder_bias_init: log_frequency has no effect with model.init_from: x"):
        tiny(tmp_path / "run", frequent, "model.decoder_bias=true", "model.init_from=x")
    with pytest.raises(
        ConfigError, match=r"decoder_bias_init: log_frequency has no effect with trainer.objective: repl"
    ):
        tiny(tmp_path / "run", frequent, "model.decoder_bias=true", "trainer.objective=replaced_token")


def test_new_tokens_of_the_normalised_model_have_length_one(tiny: Tiny, tmp_path: Path) -> None:
    first, second, folder = tmp_path / "first", tmp_path / "second", tmp_path / "tokenizer"
    short = ["trainer.max_steps=2", "trainer.eval_steps=0", "trainer.save_steps=0"]
    short += ["model.ngpt=true", "optimizer.weight_decay=0"]
    pretrain(tiny(first, *short))
    train_tokenizer(iter(make_texts(40, seed=5)), algorithm="byte_bpe", vocab_size=330).save(folder)
    config = tiny(second, *short, f"model.init_from={first}", f"tokenizer.path={folder}")
    module = build_run(config).module
    for matrix, dim in module.unit_matrices():
        torch.testing.assert_close(matrix.norm(dim=dim), torch.ones(matrix.shape[1 - dim]))
    assert module.logit_scale.shape == (384,)
    assert module.logit_scale[-1].item() == pytest.approx(module.logit_scale.mean().item(), rel=0.05)


@pytest.mark.filterwarnings("ignore:.*has no manifest.json")
def test_weights_without_a_tokenizer_are_refused(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    newest = source / "checkpoints" / "6"
    for name in ("model_config.json", "train_state.json"):
        (bare / name).write_text((newest / name).read_text())
    save_file(load_file(newest / "model.safetensors"), bare / "model.safetensors")
    with pytest.raises(StartupError, match=r"model.init_from: .*bare has no tokenizer, so its embeddings cannot"):
        pretrain(tiny(tmp_path / "run", f"model.init_from={bare}"))


LARGER = ["model.hidden_size=80", "model.num_attention_heads=5", "model.num_hidden_layers=3"]


def test_a_larger_model_starts_far_below_a_random_one(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    short = ["trainer.max_steps=1", "model.intermediate_size=96", *LARGER]
    pretrain(tiny(tmp_path / "tiled", f"model.init_from={source}", "model.init_tile=true", *short))
    pretrain(tiny(tmp_path / "random", *short))
    learned = log_lines(source, "eval")[-1]["loss"]
    tiled, random = first_evaluation(tmp_path / "tiled"), first_evaluation(tmp_path / "random")
    assert random - learned > 1
    assert tiled - learned < 0.2 * (random - learned)
    said = (tmp_path / "tiled" / "training.log").read_text()
    assert "(checkpoint layout after 6 steps): 20 tensors; tiled to 3 layers x 80; the tokenizer is the same" in said
    config = json.loads((tmp_path / "tiled" / "checkpoints" / "1" / "model_config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (80, 3)


def test_tiling_and_another_tokenizer_together(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "tokenizer"
    train_tokenizer(iter(make_texts(40, seed=5)), algorithm="byte_bpe", vocab_size=330).save(folder)
    out = tmp_path / "run"
    tile = [f"model.init_from={source}", "model.init_tile=true", f"tokenizer.path={folder}", "trainer.max_steps=1"]
    pretrain(tiny(out, *tile, *LARGER))
    assert "tokens that its tokenizer lacks start at their mean" in (out / "training.log").read_text()


def test_what_cannot_be_tiled_is_an_error_with_a_remedy(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    init = f"model.init_from={source}"
    with pytest.raises(StartupError, match=r"model.init_tile: true to make a larger model of it"):
        pretrain(tiny(tmp_path / "run", init, *LARGER))
    with pytest.raises(StartupError, match=r"model.num_hidden_layers: 1 is less than the 2 to be tiled"):
        pretrain(tiny(tmp_path / "run", init, "model.init_tile=true", "model.num_hidden_layers=1"))
    with pytest.raises(StartupError, match=r"2 heads of 40, but the heads to be tiled have width 16"):
        pretrain(tiny(tmp_path / "run", init, "model.init_tile=true", "model.hidden_size=80"))
    with pytest.raises(StartupError, match=r"model.rms_norm: the config has False, "):
        pretrain(tiny(tmp_path / "run", init, "model.init_tile=true", "model.rms_norm=false", *LARGER))
    with pytest.raises(ConfigError, match=r"model.init_tile: true has no effect without model.init_from"):
        tiny(tmp_path / "run", "model.init_tile=true")
