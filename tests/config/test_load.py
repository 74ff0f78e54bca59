"""Files, variables and overrides -> Config; every error is tested by reading its message."""

import subprocess
import sys
from pathlib import Path

import pytest

from neobert.config.fields import FIELDS
from neobert.config.load import ConfigError, load_config, parse_config
from neobert.config.schema import Config

SOURCE = "dataset: {name: python_stdlib}\n"
TOKENIZER = "tokenizer: {train: true}\n"
BASE = SOURCE + TOKENIZER + "trainer: {max_steps: 10}\n"


def errors_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides)
    return caught.value.errors


def error_of(text: str, *overrides: str) -> str:
    errors = errors_of(text, *overrides)
    assert len(errors) == 1, errors
    return errors[0]


def with_trainer(line: str) -> str:
    return SOURCE + TOKENIZER + f"trainer: {{max_steps: 10, {line}}}\n"


def test_a_small_file_loads_with_defaults():
    config = parse_config(BASE)
    assert config.trainer.max_steps == 10
    assert config.dataset.name == "python_stdlib"
    assert config.model == Config().model


def test_the_schema_needs_no_omegaconf():
    code = "import sys, neobert.config.schema; print([m for m in ('omegaconf', 'yaml', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- values ----


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("6.0E-4", 6e-4), ("1", 1.0), ("'0.5'", 0.5), (".5", 0.5), ("1_0", 10.0)],
)
def test_numbers(written, value):
    lr = parse_config(BASE + f"optimizer: {{lr: {written}}}").optimizer.lr
    assert (lr, type(lr)) == (value, float)


@pytest.mark.parametrize(("written", "value"), [("1e5", 100_000), ("100.0", 100), ("012", 12), ("1_000", 1000)])
def test_integers_may_be_written_as_whole_numbers(written, value):
    steps = parse_config(BASE, [f"--trainer.max_steps={written}"]).trainer.max_steps
    assert (steps, type(steps)) == (value, int)
    assert parse_config(SOURCE + TOKENIZER + f"trainer: {{max_steps: {written}}}").trainer.max_steps == value


@pytest.mark.parametrize("written", ["no", "012", "1234e5", "1:30", "2023-11-01", "on", "1_000", "0x10", "true"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_texts_are_read_as_typed(written, quote):
    text = BASE.replace("name: python_stdlib", f"name: a/b, revision: {quote}{written}{quote}")
    assert parse_config(text).dataset.revision == written
    assert parse_config(BASE, ["dataset.name=a/b", "--dataset.revision", written]).dataset.revision == written


@pytest.mark.parametrize("written", ["null", "~", "", "none", "None", "NULL", "''"])
def test_null(written):
    assert parse_config(BASE + f"wandb: {{name: {written}}}").wandb.name is None
    assert parse_config(BASE, ["--trainer.gradient_clipping", "none"]).trainer.gradient_clipping is None


def test_a_quoted_none_is_a_text():
    assert parse_config(BASE + 'wandb: {name: "none"}').wandb.name == "none"


@pytest.mark.parametrize("word", ["true", "True", "yes", "on", "1"])
def test_true(word):
    assert parse_config(with_trainer(f"use_cpu: {word}")).trainer.use_cpu is True


@pytest.mark.parametrize("word", ["false", "False", "no", "off", "0"])
def test_false(word):
    assert parse_config(BASE, ["--model.rope", word]).model.rope is False


@pytest.mark.parametrize("word", ["no", "No", "false", "off", "'no'"])
def test_a_yaml_false_is_the_value_of_a_choice(word):
    trainer = parse_config(with_trainer(f"eval_strategy: {word}, save_strategy: {word}")).trainer
    assert (trainer.eval_strategy, trainer.save_strategy) == ("no", "no")
    assert parse_config(BASE + f"wandb: {{watch: {word.replace('no', 'off')}}}").wandb.watch == "off"


@pytest.mark.parametrize(
    ("written", "stored"),
    [("no", "no"), ("fp32", "no"), ("false", "no"), ("bf16", "bf16"), ("true", "bf16"), ("BF16", "bf16")],
)
def test_mixed_precision(written, stored):
    assert parse_config(with_trainer(f"mixed_precision: {written}")).trainer.mixed_precision == stored
    assert parse_config(BASE, ["--trainer.mixed_precision", written]).trainer.mixed_precision == stored


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        *((word, "latest") for word in ("true", "auto", "latest", "Latest")),
        *((word, None) for word in ("false", "no", "none", "null")),
        *((word, word) for word in ("1000", "outputs/a/checkpoints/5")),
    ],
)
def test_resume_from_checkpoint(written, stored):
    trainer = parse_config(with_trainer(f"resume_from_checkpoint: {written}")).trainer
    assert trainer.resume_from_checkpoint == stored
    override = parse_config(BASE, [f"--trainer.resume_from_checkpoint={written}"])
    assert override.trainer.resume_from_checkpoint == stored


def test_question_marks_are_text():
    assert parse_config(BASE + 'wandb: {name: "???"}').wandb.name == "???"


def test_lists_are_tuples():
    config = parse_config(BASE + "optimizer: {betas: [0.9, 1e-1]}\nwandb: {tags: [no, 012, 'a b']}")
    assert config.optimizer.betas == (0.9, 0.1)
    assert config.wandb.tags == ("no", "012", "a b")
    config = parse_config(BASE, ["--optimizer.betas", "[0.8, 0.95]", "wandb.tags=[on, x]"])
    assert (config.optimizer.betas, config.wandb.tags) == ((0.8, 0.95), ("on", "x"))
    assert parse_config(BASE, ["--wandb.tags", "null"]).wandb.tags == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.save_steps=abc", "trainer.save_steps: 'abc' is not an integer"),
        ("trainer.save_steps=1.5", "trainer.save_steps: '1.5' is not an integer"),
        ("trainer.save_steps=1:30", "trainer.save_steps: '1:30' is not an integer"),
        ("optimizer.lr=fast", "optimizer.lr: 'fast' is not a number"),
        ("optimizer.lr=nan", "optimizer.lr: 'nan' is not a number"),
        ("optimizer.lr=inf", "optimizer.lr: 'inf' is not a number"),
        ("model.rope=maybe", "model.rope: 'maybe' is not true or false"),
        ("model.hidden_act=swiglo", "'swiglo' is not one of swiglu, gelu, geglu. Did you mean swiglu?"),
        ("trainer.save_strategy=epoch", "trainer.save_strategy: 'epoch' is not one of steps, no"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected a list of 2 numbers, got 1"),
        ("optimizer.betas=0.9,0.95", "'0.9,0.95' is not a list of 2 numbers; write it as [0.9, 0.95]"),
        ("optimizer.betas=[[1], 2]", "an item is itself a list"),
        ("optimizer.betas={a: 1}", "is not a list of 2 numbers"),
        ("trainer.save_steps=null", "trainer.save_steps: may not be null, expected integer"),
        ("trainer.output_dir=none", "remove it for the default 'outputs/neobert'"),
        ("trainer.mixed_precision=fp16", "trainer.mixed_precision: fp16 is refused: its small range overflows"),
        ("optimizer.name=muon", "optimizer.name: 'muon' is written muonclip"),
        ("optimizer.muon_config=3", "optimizer.muon_config: is a section; set its keys one by one"),
        ("optimizer.muon_config.ns_step=3", "unknown key. Did you mean optimizer.muon_config.ns_steps?"),
        ("task=mteb", "task: MTEB needs no config: write `neobert mteb"),
        ("model.attn_backend=flash", "model.attn_backend: 'flash' is written flash_attn_varlen"),
    ],
)
def test_wrong_values(override, message):
    assert message in error_of(BASE, override)


def test_wrong_values_in_a_file():
    assert error_of(with_trainer("save_steps: [1]")) == "trainer.save_steps: expected integer, got a list"
    assert error_of(with_trainer("save_steps: {a: 1}")) == "trainer.save_steps: expected integer, got a mapping"
    assert error_of(BASE + "wandb: 5") == "wandb: is a section; expected keys with values below it, got '5'"
    assert (
        error_of(BASE + "optimizer: {betas: {a: 1}}") == "optimizer.betas: expected a list of 2 numbers, got a mapping"
    )


# ---- keys ----


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("trainer.max_step", "Did you mean trainer.max_steps?"),
        ("max_steps", "Did you mean trainer.max_steps?"),
        ("trainer.mlm_probability", "Did you mean datacollator.mlm_probability?"),
        ("model.hiden_size", "Did you mean model.hidden_size?"),
        ("trainr.save_steps", "Did you mean trainer.save_steps?"),
        ("model.num_heads", "Did you mean model.num_attention_heads?"),
        ("trainer.clip", "Did you mean trainer.gradient_clipping?"),
        ("optimizer.groups.matrix.lr", "Did you mean optimizer.groups.matrices.lr?"),
        ("zzz", "--help lists all keys"),
        ("model.zzz", "--help lists all keys"),
    ],
)
def test_unknown_keys(key, hint):
    error = error_of(BASE, f"--{key}=1")
    assert error.startswith(f"{key}: unknown key")
    assert hint in error


def test_unknown_sections():
    assert error_of(BASE + "modle: {hidden_size: 8}") == "modle: unknown key. Did you mean model?"


def test_keys_below_values_and_sections_as_values():
    assert "trainer.max_steps is a value (integer or null), nothing is below it" in error_of(
        BASE, "trainer.max_steps.x=3"
    )
    assert (
        error_of(BASE, "--model", "3")
        == "model: is a section; set its keys one by one, for example --model.hidden_size"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_steps: 10, learning_rate: 1e-3}", "trainer.learning_rate: is written optimizer.lr here"),
        ("optimizer: {hparams: {lr: 1}}", "optimizer.hparams.lr: is written optimizer.lr here"),
        ("optimizer: {muon_config: {algorithm: x}}", "optimizer.muon_config.algorithm: is an old name: write"),
        ("mteb_pooling: cls", "mteb_pooling: is not a key: `neobert mteb RUN` takes that of the checkpoint"),
        ("glue: {num_labels: 2}", "glue.num_labels: follows from the task: remove it"),
        ("model: {pad_token_id: 0}", "model.pad_token_id: comes from the tokenizer: remove it"),
        ("tokenizer: {padding: true, train: true}", "tokenizer.padding: has no effect"),
        ("model: {classifier_init_range: 0.1}", "model.classifier_init_range: has no effect"),
        ("use_deepspeed: true", "use_deepspeed: is not supported: its ZeRO stages are trainer.parallel: fsdp2"),
    ],
)
def test_refused_keys_in_a_file(text, message):
    name = text.partition(":")[0]
    base = "".join(line + "\n" for line in BASE.splitlines() if not line.startswith(f"{name}:"))
    assert error_of(base + text).startswith(message)


def test_refused_keys_on_the_command_line():
    assert "model.classifier_init_range: has no effect" in error_of(BASE, "--model.classifier_init_range", "1")
    assert "glue.task_name: is written glue.tasks here" in error_of(BASE, "glue.task_name=cola")
    assert error_of(BASE, "--variables.x=3") == "variables: are set in the config file only, under `variables:`"


def test_all_errors_come_together_and_none_twice():
    text = "modle: {}\ntrainer: {max_step: 10, save_steps: x}\nmodel: {hidden_size: 770}\noptimizer: {lr: -1}\n"
    errors = errors_of(text, "--model.rope", "maybe", "what")
    keys = [error.partition(":")[0] for error in errors]
    expected = ["modle", "trainer.max_step", "'what'", "trainer.save_steps", "model.rope"]
    # trainer.max_steps is not missed on top of `trainer.max_step`
    assert keys == [*expected, "optimizer.lr", "model.num_attention_heads", "dataset.name", "tokenizer.name"]


def test_the_error_is_a_readable_list(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"4 errors in {path}:"
    assert lines[1] == "  - seed: 'x' is not an integer"
    assert len(lines) == 5


# ---- overrides ----


def test_every_key_takes_all_three_spellings():
    for key, field in FIELDS.items():
        value = {bool: "true", int: "16", float: "0.5", str: "a"}.get(field.kind)
        value = field.choices[-1] if field.choices else value
        if value is None or key in ("trainer.max_steps", "trainer.max_tokens", "trainer.num_train_epochs"):
            continue
        results = [outcome(key, words) for words in ([f"--{key}", value], [f"--{key}={value}"], [f"{key}={value}"])]
        assert results[0] == results[1] == results[2], key
        assert not any(word in results[0] for word in ("unknown", "expected", "not an override")), (key, results[0])


def outcome(key: str, words: list[str]) -> str:
    try:
        return str(FIELDS[key].value_in(parse_config(BASE, words)))
    except ConfigError as error:
        return str(error)


def test_a_bare_key_is_true_for_a_switch_and_an_error_else():
    config = parse_config(BASE, ["--trainer.use_cpu", "--trainer.save_steps", "-0"])
    assert (config.trainer.use_cpu, config.trainer.save_steps) == (True, 0)
    config = parse_config(BASE, ["--trainer.use_cpu", "trainer.save_steps=7"])
    assert (config.trainer.use_cpu, config.trainer.save_steps) == (True, 7)
    error = error_of(BASE, "--trainer.save_steps", "--trainer.use_cpu")
    assert error == "trainer.save_steps: --trainer.save_steps needs a value, integer"


def test_values_with_an_equals_sign_and_a_last_argument_that_wins():
    config = parse_config(BASE, ["--trainer.output_dir", "runs/lr=1e-4", "wandb.name=a=b", "seed=1", "--seed", "2"])
    assert (config.trainer.output_dir, config.wandb.name, config.seed) == ("runs/lr=1e-4", "a=b", 2)


def test_an_override_replaces_a_wrong_value_of_the_file():
    assert parse_config(with_trainer("save_steps: abc"), ["trainer.save_steps=5"]).trainer.save_steps == 5


def test_arguments_that_are_no_overrides():
    assert error_of(BASE, "max").startswith("'max': not an override; write --section.key value")


# ---- budget ----


@pytest.mark.parametrize("in_file", ["max_steps: 7", "max_tokens: 1e6", "num_train_epochs: 2"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer.max_steps", 3), ("trainer.max_tokens", 100), ("trainer.num_train_epochs", 0.5)],
)
def test_a_budget_on_the_command_line_replaces_the_files(in_file, key, value):
    config = parse_config(SOURCE + TOKENIZER + f"trainer: {{{in_file}}}", [f"--{key}", str(value)])
    budgets = [config.trainer.max_steps, config.trainer.max_tokens, config.trainer.num_train_epochs]
    assert FIELDS[key].value_in(config) == value
    assert budgets.count(None) == 2


@pytest.mark.parametrize(
    ("word", "value", "key"),
    [
        ("learning_rate", "1e-4", "optimizer.lr"),
        ("sequence_len", "512", "dataset.max_seq_length"),
        ("micro_batch_size", "8", "trainer.per_device_train_batch_size"),
        ("warmup_ratio", "0.06", "scheduler.warmup_percent, in percent: 6 for 0.06"),
        ("num_epochs", "3", "trainer.num_train_epochs"),
        ("num_train_epochs", "3", "trainer.num_train_epochs"),
        ("report_to", "wandb", "trainer.report_to"),
        ("bf16", "true", "trainer.mixed_precision"),
        ("model_name_or_path", "bert-base-uncased", "model.init_from"),
        ("sample_packing", "true", "datacollator.pack_sequences"),
        ("per_device_train_batch_size", "8", "trainer.per_device_train_batch_size"),
        ("weight_decay", "0.1", "optimizer.weight_decay"),
        ("gradient_accumulation_steps", "2", "trainer.gradient_accumulation_steps"),
        ("output_dir", "x", "trainer.output_dir"),
    ],
)
def test_keys_of_other_programs_get_the_right_key(word, value, key):
    for text, overrides in [
        (BASE + f"{word}: {value}\n", ()),
        (BASE, (f"--{word}={value}",)),
        (with_trainer(f"{word}: {value}") if not key.startswith("trainer.") else BASE + f"{word}: {value}\n", ()),
    ]:
        error = error_of(text, *overrides)
        assert word in error.partition(":")[0]
        assert key in error


@pytest.mark.parametrize("in_file", ["name: a/b, config: en, revision: main", "path: old", "mixture: [{name: a/b}]"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("dataset.path", "my.jsonl"), ("dataset.name", "c/d"), ("dataset.mixture", "[{path: my.jsonl}]")],
)
def test_a_source_on_the_command_line_replaces_the_files(in_file, key, value):
    rest = TOKENIZER + "trainer: {max_steps: 1}\n"
    alone = parse_config(rest, [f"{key}={value}"])
    assert parse_config(f"dataset: {{{in_file}}}\n{rest}", [f"{key}={value}"]) == alone


def test_a_folder_of_sets_on_the_command_line_keeps_their_names():
    text = "task: contrastive\ndataset: {name: ALLNLI, path: old}\ntrainer: {max_steps: 1}\n"
    config = parse_config(text, ["dataset.path=new", "contrastive.allow_random_weights=true", "tokenizer.path=tok"])
    assert (config.dataset.name, config.dataset.path) == ("ALLNLI", "new")


def test_a_file_names_exactly_one_budget():
    assert "this config sets none" in error_of(SOURCE + TOKENIZER)
    error = error_of(with_trainer("max_tokens: 1000"))
    assert "set exactly one of trainer.max_steps, trainer.max_tokens, trainer.num_train_epochs" in error
    assert "trainer.max_steps = 10 and trainer.max_tokens = 1000" in error
    assert "this config sets none" in error_of(BASE, "--trainer.max_steps", "null")
    assert "trainer.max_steps = 3 and trainer.max_tokens = 5" in error_of(
        BASE, "trainer.max_steps=3", "trainer.max_tokens=5"
    )


# ---- variables ----


VARIABLES = """
variables:
  root: /data
  deep: {n: 64, path: "{$variables.root}/books"}
  betas: [0.5, 0.6]
  off: no
  small: {hidden_size: 64, num_attention_heads: 2}
"""


def with_variables(line: str) -> Config:
    return parse_config(VARIABLES + BASE + line)


def test_variables_alone_keep_their_type():
    assert with_variables("optimizer: {betas: $variables.betas}").optimizer.betas == (0.5, 0.6)
    assert with_variables("scheduler: {warmup_steps: $variables.deep.n}").scheduler.warmup_steps == 64
    assert with_variables("model: $variables.small").model.hidden_size == 64
    assert with_variables('wandb: {watch: "${variables.off}"}').wandb.watch == "off"


@pytest.mark.parametrize("reference", ["{$variables.deep.path}", "${variables.deep.path}"])
def test_variables_inside_texts(reference):
    assert with_variables(f'wandb: {{dir: "{reference}/x/{{$variables.deep.n}}"}}').wandb.dir == "/data/books/x/64"
    assert with_variables(f'wandb: {{tags: ["{reference}", b]}}').wandb.tags == ("/data/books", "b")


def test_variables_in_overrides():
    assert parse_config(VARIABLES + BASE, ["--wandb.dir", "{$variables.root}/w"]).wandb.dir == "/data/w"


def test_doubled_dollars_are_plain_text():
    assert with_variables("wandb: {name: $$variables.root}").wandb.name == "$variables.root"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wandb: {dir: $variables.zzz}", "wandb.dir: there is no variable 'zzz' in the section `variables:`"),
        ("wandb: {dir: '{$variables.root.x}/a'}", "there is no variable 'root.x'"),
        ("wandb: {dir: 'a/{$variables.betas}'}", "{$variables.betas} is inside a text, but it is a list"),
    ],
)
def test_wrong_references(line, message):
    assert message in error_of(VARIABLES + BASE + line)


def test_circles():
    text = "variables: {a: $variables.b, b: 'x{$variables.a}'}\n" + BASE + "wandb: {name: $variables.a}"
    assert error_of(text) == "wandb.name: variables refer to each other in a circle: a -> b -> a"


def test_other_interpolations_are_not_replaced():
    error = error_of(BASE, "--trainer.output_dir=${oc.env:HOME}/x")
    assert "trainer.output_dir: '${oc.env:HOME}/x' holds a reference that is not replaced" in error
    text = 'trainer: {max_steps: 1, fill_mask_texts: ["echo ${x [MASK]", "${a:b} [MASK]"]}'
    assert parse_config(SOURCE + TOKENIZER + text).trainer.fill_mask_texts == ("echo ${x [MASK]", "${a:b} [MASK]")


# ---- files ----


def test_merge_keys_and_anchors():
    text = "model: &m {hidden_size: 96, num_attention_heads: 4}\n" + BASE.replace(
        "trainer: {", "trainer: {<<: {save_steps: 5, output_dir: 'none'}, "
    )
    config = parse_config(text)
    assert (config.model.hidden_size, config.trainer.save_steps, config.trainer.output_dir) == (96, 5, "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "not valid YAML: line 2, column 1: found duplicate key seed"),
        ("a: [1\n", "not valid YAML: line 2"),
        ("- a\n", "not valid YAML: the file must hold `key: value` lines"),
        ("hello\n", "not valid YAML: the file must hold `key: value` lines"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
    ],
)
def test_broken_files(text, message):
    assert message in error_of(text)


def test_a_missing_file_lists_what_is_near(tmp_path):
    (tmp_path / "configs" / "pretraining").mkdir(parents=True)
    near = tmp_path / "configs" / "pretraining" / "quickstart.yaml"
    near.write_text(BASE)
    for wrong in (
        near.with_name("quikstart.yaml"),
        tmp_path / "configs" / "quickstart.yaml",
        tmp_path / "a" / "b.yaml",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(wrong)
        assert str(wrong) in str(caught.value)
        assert caught.value.errors == [f"the config file does not exist; YAML files nearby: {near}"]
    with pytest.raises(ConfigError, match="the config file is a folder"):
        load_config(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        load_config(tmp_path / "x.yaml")


def test_without_a_file():
    assert load_config(None, ["dataset.name=python_stdlib", "tokenizer.train=true", "trainer.max_steps=3"]).seed == 0


def test_a_first_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = SOURCE + "trainer: {max_steps: 10, output_dir: ~/run}\ntokenizer: {path: ~/tok}\nmodel: {init_from: a~b}"
    config = parse_config(text)
    assert (config.trainer.output_dir, config.tokenizer.path) == ("/home/me/run", "/home/me/tok")
    assert config.model.init_from == "a~b"


@pytest.mark.parametrize(
    "key", ["dataset.path", "dataset.name", "model.init_from", "trainer.resume_from_checkpoint", "tokenizer.path"]
)
def test_an_override_of_an_unset_variable_is_an_error(key: str) -> None:
    base = "dataset: {name: python_stdlib}\ntokenizer: {train: true}\ntrainer: {max_steps: 1}\n"
    for words in ([f"--{key}", ""], [f"--{key}="], [f"{key}="]):
        with pytest.raises(ConfigError, match=f"{key}: is empty on the command line .* null means none"):
            parse_config(base, words)
