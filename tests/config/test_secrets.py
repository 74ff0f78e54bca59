"""Secrets are recognised by name, by place and by shape; ordinary settings are left alone."""

from dataclasses import replace

import pytest

from neobert.config.schema import Config, WandbSection
from neobert.config.secrets import is_secret_name, scrub, scrub_config


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pa55@host/data.jsonl", "https://***@host/data.jsonl"),
        ("s3://AKIA:zzz@bucket and ftp://me@there", "s3://***@bucket and ftp://***@there"),
        ("hf_token=abc123 next=1", "hf_token=*** next=1"),
        ("{'api_key': 'abc', 'lr': 1}", "{'api_key': '***', 'lr': 1}"),
        ("WANDB_API_KEY: 0123abcd", "WANDB_API_KEY: ***"),
        ("https://host/file?token=abc&page=2", "https://host/file?token=***&page=2"),
        ("python x.py --hub-token abc123 --steps 5", "python x.py --hub-token *** --steps 5"),
        ("a hf_abcdefghijklmnopqrstuvwx b", "a *** b"),
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
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert scrub(text) == text


def test_values_of_secret_variables_go_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-long-secret-value")
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("NEOBERT_FOLDER", "an-ordinary-value")
    assert scrub("x a-long-secret-value y short an-ordinary-value") == "x *** y short an-ordinary-value"


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
        "wandb",
        "contrastive",
    }
    assert clean["wandb"]["tags"] == ["a", "https://***@h/x"]
    assert len(clean["trainer"]) == len(config.trainer.__dataclass_fields__)
    assert clean["optimizer"]["lr"] == config.optimizer.lr
    assert scrub_config({"a": {"token": "x", "b": 1}, "password": "y"}) == {"a": {"b": 1}}
