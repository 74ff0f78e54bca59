"""The optimizer section: settings that have no effect with the optimizer that is named are errors."""

import pytest

from neobert.config.load import ConfigError, parse_config
from neobert.config.schema_optimizer import GroupSection, MuonSection

BASE = "dataset: {name: python_stdlib}\ntokenizer: {train: true}\ntrainer: {max_steps: 10}\n"


def errors(*overrides: str) -> list[str]:
    try:
        parse_config(BASE, overrides)
    except ConfigError as error:
        return error.errors
    return []


def test_a_file_with_every_key_of_muon() -> None:
    text = """
optimizer:
  name: muonclip
  lr: 1e-3
  groups:
    matrices: {lr: 2e-2}
    embeddings: {lr: 3e-3, weight_decay: 0.01}
  muon_config:
    muon_beta: 0.9
    nesterov: true
    muon_decay: 0.01
    orthogonalization: newton_schulz
    ns_steps: 6
    norm_factor: none
    enable_clipping: true
    clipping_threshold: 30
    clipping_alpha: 0.25
    clipping_warmup_steps: 100
    clipping_interval: 5
    clipping_qk_chunk_size: 512
    capture_last_microbatch_only: true
"""
    section = parse_config(BASE + text).optimizer
    assert section.groups.matrices == GroupSection(lr=0.02)
    assert section.groups.embeddings == GroupSection(lr=0.003, weight_decay=0.01)
    assert section.muon_config == MuonSection(
        muon_beta=0.9,
        nesterov=True,
        muon_decay=0.01,
        orthogonalization="newton_schulz",
        ns_steps=6,
        norm_factor="none",
        clipping_threshold=30.0,
        clipping_alpha=0.25,
        clipping_warmup_steps=100,
        clipping_interval=5,
        clipping_qk_chunk_size=512,
        capture_last_microbatch_only=True,
    )


@pytest.mark.parametrize("name", ["adamw", "adam", "stable_adamw", "muonclip", "normuon"])
def test_every_optimizer_is_valid_as_it_is(name: str) -> None:
    assert errors(f"optimizer.name={name}") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.muon_config.ns_steps=4"],
            "optimizer.muon_config.ns_steps: 4 has no effect with optimizer.name: adamw; remove it, or write "
            "optimizer.name: muonclip or normuon",
        ),
        (
            ["optimizer.name=muonclip", "optimizer.muon_config.normuon_beta2=0.9"],
            "optimizer.muon_config.normuon_beta2: 0.9 has no effect with optimizer.name: muonclip; remove it, or write "
            "optimizer.name: normuon",
        ),
        (
            [
                "optimizer.name=normuon",
                "optimizer.muon_config.enable_clipping=false",
                "optimizer.muon_config.clipping_alpha=1",
            ],
            "optimizer.muon_config.clipping_alpha: 1.0 has no effect without optimizer.muon_config.enable_clipping; "
            "set that, or remove this key",
        ),
        (
            ["optimizer.name=muonclip", "optimizer.groups.matrices.weight_decay=0.1"],
            "optimizer.groups.matrices.weight_decay: 0.1 is written optimizer.muon_config.muon_decay with "
            "optimizer.name: muonclip",
        ),
        (
            ["optimizer.name=adam", "optimizer.decoupled_weight_decay=true"],
            "optimizer.decoupled_weight_decay: true contradicts optimizer.name: adam, whose decay is part of the "
            "gradient; write adamw",
        ),
        (
            ["optimizer.groups.head.lr=0.1"],
            "optimizer.groups.head.lr: 0.1 has no effect with model.tie_word_embeddings: true; remove it, or write "
            "model.tie_word_embeddings: false",
        ),
        (["optimizer.groups.vectors.lr=0"], "optimizer.groups.vectors.lr: 0.0 must be greater than 0"),
        (
            ["optimizer.name=muonclip", "optimizer.muon_config.clipping_interval=0"],
            "optimizer.muon_config.clipping_interval: 0 must be at least 1",
        ),
        (
            ["optimizer.name=muonclip", "optimizer.muon_config.clipping_alpha=1.5"],
            "optimizer.muon_config.clipping_alpha: 1.5 must be from 0 to 1",
        ),
        (
            ["optimizer.name=muonclip", "optimizer.muon_config.muon_beta=1"],
            "optimizer.muon_config.muon_beta: 1.0 must be at least 0 and less than 1",
        ),
    ],
)
def test_what_contradicts_itself(overrides: list[str], message: str) -> None:
    assert errors(*overrides) == [message]


def test_the_head_has_settings_where_there_is_one() -> None:
    assert errors("optimizer.groups.head.lr=0.1", "model.tie_word_embeddings=false") == []


@pytest.mark.parametrize("variant", ["qk_norm", "ngpt"])
def test_clipping_needs_queries_and_keys_that_can_grow(variant: str) -> None:
    given = ["--optimizer.name", "muonclip", f"--model.{variant}", "true", "--optimizer.weight_decay", "0"]
    assert errors(*given) == [
        f"optimizer.muon_config.enable_clipping: true has nothing to clip with model.{variant}: true, whose queries "
        "and keys have a fixed length; write optimizer.muon_config.enable_clipping: false"
    ]
    assert errors(*given, "--optimizer.muon_config.enable_clipping", "false") == []
