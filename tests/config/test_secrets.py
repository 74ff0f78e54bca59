"""Secrets are recognised by name, by position and by shape; ordinary settings are left alone."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from neobert.config.fields import FIELDS
from neobert.config.load import ConfigError, config_to_yaml, load_saved_config, parse_config, without_secrets
from neobert.config.schema import Config, WandbSection
from neobert.config.schema_data import MixtureSource
from neobert.errors import DataError
from neobert.secrets import build_logger, hide_credentials, is_secret_name, scrub, scrub_config


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pa55@host/data.jsonl", "https://<hidden:credentials>@host/data.jsonl"),
        (
            "s3://AKIA:zzz@bucket and ftp://me@there",
            "s3://<hidden:credentials>@bucket and ftp://<hidden:credentials>@there",
        ),
        ("hf_token=abc123 next=1", "hf_token=<hidden:hf_token> next=1"),
        ("{'api_key': 'abc', 'lr': 1}", "{'api_key': '<hidden:api_key>', 'lr': 1}"),
        ("WANDB_API_KEY: 0123abcd", "WANDB_API_KEY: <hidden:WANDB_API_KEY>"),
        ("https://host/file?token=abc&page=2", "https://host/file?token=<hidden:token>&page=2"),
        ("python x.py --hub-token abc123 --steps 5", "python x.py --hub-token <hidden:hub-token> --steps 5"),
        ("a hf_abcdefghijklmnopqrstuvwx b", "a <hidden:token> b"),
        ("a github_pat_11ABCDEFG0abcdefghijkl b ASIAABCDEFGHIJKLMNOP", "a <hidden:token> b <hidden:token>"),
        (
            "Max retries with url: /a.jsonl?X-Amz-Date=1&X-Amz-Signature=5ec2e7&x=1 (Caused by",
            "Max retries with url: /a.jsonl?X-Amz-Date=1&X-Amz-Signature=<hidden:X-Amz-Signature>&x=1 (Caused by",
        ),
        ("404, url='/c/a.jsonl?sv=2&sig=5ec2e7'", "404, url='/c/a.jsonl?sv=2&sig=<hidden:sig>'"),
        ("{'Authorization': 'Bearer 5ec2e7'}", "{'Authorization': 'Bearer <hidden:Authorization>'}"),
        ("AccountName=x;AccountKey=5ec2e7==;y", "AccountName=x;AccountKey=<hidden:AccountKey>"),
    ],
)
def test_secrets_go(text: str, clean: str) -> None:
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "[tokenizer] name=bert-base-uncased max_length=512",
        "max_tokens=1000 allow_special_token_rewrite=True",
        "0.1 MFLOP a token forward and backward",
        "the mask token is [MASK]; 21,000 tokens/s | lr 1.00e-02",
        "https://huggingface.co/datasets/x@main",
        "train step      12 | loss 4.2763 | data wait 0.1%",
        "keys to change: trainer.gradient_checkpointing: true",
        "data/token=bpe/part-0.jsonl: 3 records",
        "outputs/sk-learn-experiments-of-may-2024/run",
        "mask_token: [MASK], unk_token='[UNK]'",
        "abfs://container@account.dfs.core.windows.net/a.jsonl",
        "hdfs://node:8020/a@b/c.jsonl",
        "hf://datasets/a/b@main/c.jsonl",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert scrub(text) == text


def test_values_of_secret_variables_go_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-long-secret-value")
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("NEOBERT_FOLDER", "an-ordinary-value")
    assert scrub("x a-long-secret-value y short an-ordinary-value") == "x <hidden:HF_TOKEN> y short an-ordinary-value"


def test_names() -> None:
    secret = ["token", "HF_TOKEN", "api_key", "apikey", "wandb.api-key", "AWS_SECRET_ACCESS_KEY", "db_password", "key"]
    assert [name for name in secret if not is_secret_name(name)] == []
    ordinary = ["tokenizer", "max_tokens", "allow_special_token_rewrite", "monkey", "keyboard", "seed", "mask_all"]
    assert [name for name in ordinary if is_secret_name(name)] == []


def test_a_config_keeps_every_key_and_loses_secrets_in_values() -> None:
    config = replace(Config(), wandb=WandbSection(tags=("a", "https://u:p@h/x"), entity="me"))
    clean = scrub_config(config)
    assert set(clean) == {"task", "seed", "model", "dataset", "tokenizer", "datacollator", "optimizer", "scheduler"} | {
        "trainer",
        "distill",
        "wandb",
        "contrastive",
        "finetune",
        "glue",
    }
    assert clean["wandb"]["tags"] == ["a", "https://<hidden:credentials>@h/x"]
    assert len(clean["trainer"]) == len(config.trainer.__dataclass_fields__)
    assert clean["optimizer"]["lr"] == config.optimizer.lr
    assert scrub_config({"a": {"token": "x", "b": 1}, "password": "y"}) == {"a": {"b": 1}}


SIGNED = [
    ("X-Amz-Signature", "https://b.s3.amazonaws.com/a.jsonl?X-Amz-Date=20240501T0Z&X-Amz-Signature=5ec2e7"),
    ("X-Amz-Credential", "https://b.s3.amazonaws.com/a.jsonl?X-Amz-Credential=5ec2e7%2F2024&X-Amz-Expires=60"),
    ("X-Amz-Security-Token", "https://b.s3.amazonaws.com/a.jsonl?X-Amz-Security-Token=5ec2e7//w=&X-Amz-Expires=60"),
    ("X-Goog-Signature", "https://storage.googleapis.com/b/a.jsonl?X-Goog-Signature=5ec2e7"),
    ("sig", "https://account.blob.core.windows.net/b/a.jsonl?sv=2023-01-03&sig=5ec2e7%3D&se=2024"),
    ("Signature", "https://d1.cloudfront.net/a.jsonl?Expires=1&Signature=5ec2e7~-_&Key-Pair-Id=K1"),
    ("AWSAccessKeyId", "https://b.s3.amazonaws.com/a.jsonl?AWSAccessKeyId=5ec2e7&Expires=1"),
    ("token", "https://host/a.jsonl?page=2&token=5ec2e7"),
    ("credentials", "https://me:5ec2e7@host/a.jsonl"),
    ("credentials", "s3://me:p@ss@5ec2e7:x@bucket/a.jsonl"),
    ("credentials", "s3://AKIA:5ec2e7/pa+ss@bucket/a.jsonl"),
    ("credentials", "zip://a.jsonl::https://me:5ec2e7@host/a.zip"),
]


@pytest.mark.parametrize(("name", "address"), SIGNED)
def test_signed_addresses_are_hidden_everywhere(
    name: str, address: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(Config(), dataset=replace(Config().dataset, path=address))
    build_logger("neobert.test").warning("%s: %s again", address, name)
    print(hide_credentials(f"'{address}'; restore {address}."))
    for text in (
        scrub(f"cannot open {address}; continue"),
        str(DataError(f"dataset.path: {address} is gone")),
        repr(scrub_config({"problem": f"404, url=URL('{address}')"})),
        config_to_yaml(without_secrets(config)),
        caplog.text,
        capsys.readouterr().out,
    ):
        assert "5ec2e7" not in text
        assert f"<hidden:{name}>" in text
        assert "a.jsonl" in text or "a.zip" in text
    assert hide_credentials(hide_credentials(address)) == hide_credentials(address)


def test_a_hidden_value_is_refused_on_load_and_read_for_comparison(tmp_path: Path) -> None:
    path = SIGNED[0][1]
    config = parse_config("", [f"dataset.path={path}", "tokenizer.train=true", "trainer.max_steps=1"])
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(without_secrets(config)))
    with pytest.raises(ConfigError, match=r"dataset.path: <hidden:X-Amz-Signature> .* --dataset.path VALUE"):
        parse_config(file.read_text())
    assert parse_config(file.read_text(), [f"dataset.path={path}"]) == config
    assert load_saved_config(file) == without_secrets(config)
    earlier = file.read_text().replace("<hidden:X-Amz-Signature>", "***")
    with pytest.raises(ConfigError, match=r"dataset.path: \*\*\* .*secret"):
        parse_config(earlier)


def test_a_hidden_value_inside_a_list_is_refused_too() -> None:
    mixture = (MixtureSource(path="https://me:hush@host/a.jsonl"), MixtureSource(path="b.jsonl"))
    config = parse_config("", ["dataset.path=x", "tokenizer.train=true", "trainer.max_steps=1"])
    saved = without_secrets(replace(config, dataset=replace(config.dataset, path=None, mixture=mixture)))
    with pytest.raises(ConfigError, match=r"dataset.mixture: <hidden:credentials> .*secret"):
        parse_config(config_to_yaml(saved))


def test_paths_and_names_are_saved_as_they_are_whatever_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every secret variable holds a piece of a value that is used, or the whole of it."""
    draw = random.Random(15)
    words = ["corpora", "wiki2024", "token=bpe", "my_token", "Secret-Garden", "api_key", "hf_data", "a b", "*.jsonl"]
    words += ["sk-learn-experiments-of-may-2024", "password", "s3://bucket", "key=7", "\u00fcber", "*"]
    base = ["tokenizer.train=true", "trainer.max_steps=1"]
    paths = ("trainer.output_dir", "wandb.dir")
    for _ in range(20):
        values = {
            key: "/".join([*([] if key in paths else ["x"]), *draw.choices(words, k=draw.randint(2, 4))])
            for key in ("dataset.path", "trainer.output_dir", "wandb.dir", "wandb.project", "model.name")
        }
        for variable in ("S3_KEY", "HF_TOKEN", "DB_PASSWORD", "SIGNING_SECRET", "SOME_API_KEY"):
            value = draw.choice(list(values.values()))
            begin = draw.randrange(max(1, len(value) - 8))
            piece = draw.choice([value, value[begin : begin + draw.randint(8, 20)]])
            monkeypatch.setenv(variable, piece)
        config = parse_config("", [*base, *(f"{key}={value}" for key, value in values.items())])
        assert parse_config(config_to_yaml(without_secrets(config))) == config


@pytest.mark.parametrize("path", ["token=bpe", "token=bpe/part-0.jsonl", "api_key=1/secret=2"])
def test_a_folder_with_the_name_of_a_secret_is_a_path(path: str) -> None:
    base = ["tokenizer.train=true", "trainer.max_steps=1"]
    mixture = f"dataset.mixture=[{{path: '{path}'}}, {{path: [x, '{path}']}}]"
    for given in (f"dataset.path={path}", f"dataset.path=['{path}', x]", mixture):
        config = parse_config("", [*base, given])
        assert parse_config(config_to_yaml(without_secrets(config))) == config
    signed = parse_config("", [*base, f"dataset.path=https://host/a.jsonl?{path}"])
    assert "<hidden:" in config_to_yaml(without_secrets(signed))


def test_a_part_of_a_path_stays_in_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_KEY", "corpora/wiki2024")
    monkeypatch.setenv("DB_PASSWORD", "wiki2024")
    for text in ("path=corpora/wiki2024/a.jsonl", "python x.py corpora/wiki2024", "data/wiki2024.jsonl", "my-wiki2024"):
        assert scrub(text) == text
    assert scrub("no entry for 'wiki2024'") == "no entry for '<hidden:DB_PASSWORD>'"


def test_no_key_has_the_name_of_a_secret() -> None:
    """Else its value would have to be hidden by its name."""
    assert [key for key in FIELDS if is_secret_name(key)] == []
