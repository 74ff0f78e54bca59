"""Contrastive runs: what they start from, what they record, and that a continued one equals the uninterrupted one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import call
from children import fork, kill, wait_until
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config
from neobert.contrastive.finetune import finetune
from neobert.contrastive.pair_data import NotPrepared, choose_sets
from neobert.correlation import spearman
from neobert.errors import DataError, StartupError
from neobert.export.verify import verify
from neobert.export.write import ExportRequest, export
from neobert.inference.model import load
from neobert.train.loop import pretrain
from neobert.weights.encoder_weights import load_encoder_weights
from neobert.weights.vector_settings import load_vector_settings

ROOT = Path(__file__).parents[2]
EXACT = ("step", "loss_hex", "grad_norm_hex", "lr", "num_tokens", "num_targets", "batch_digest")
Contrastive = Callable[..., Config]


def log_lines(output_dir: Path, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def exact_steps(output_dir: Path, *, after: int = 0) -> list[tuple[object, ...]]:
    return [tuple(x[k] for k in EXACT) for x in log_lines(output_dir, "step") if x["step"] > after]  # type: ignore[operator]


@pytest.fixture(scope="module")
def pretrained(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run with checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(tiny(folder, "trainer.max_steps=8"))
    return folder


VARIANTS: dict[str, list[str]] = {
    "chunks, dropout": [
        "trainer.per_device_train_batch_size=2",
        "trainer.global_batch_size=8",
        "model.dropout_prob=0.1",
    ],
    "learned temperature, both directions, no threads": [
        "contrastive.learn_temperature=true",
        "contrastive.both_directions=true",
        "dataset.num_workers=0",
    ],
    "three kinds of sets": ["dataset.name=null", "ALL_SETS", "dataset.alpha=0.5"],
    "masked language modelling in between": [
        "contrastive.pretraining_prob=0.5",
        "contrastive.pretraining_dataset=TEXTS",
        "contrastive.pretraining_objective=mlm",
        "model.tie_word_embeddings=false",
    ],
}


FRESH_ONLY = [
    "contrastive.allow_random_weights=false",
    "contrastive.pretrained_checkpoint_dir=nowhere",
    "contrastive.pretrained_checkpoint=3",
    "dataset.force_redownload=true",
]
"""Other values of keys that a resume does not read."""


def test_a_resumed_run_learns_from_the_same_teacher(
    contrastive: Contrastive, pretrained: Path, tmp_path: Path, all_sets: str
) -> None:
    """Of all kinds of sets; the teacher is a model of the same width, the evaluation is that of the sets."""
    taught = [f"contrastive.teacher={pretrained}", "contrastive.loss_type=distill", "dataset.name=null", all_sets]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune(contrastive(whole, *taught, "trainer.max_steps=8", "trainer.global_batch_size=8"))
    finetune(
        contrastive(resumed, *taught, "trainer.max_steps=8", f"trainer.resume_from_checkpoint={whole}/checkpoints/4")
    )
    assert exact_steps(resumed) == exact_steps(whole, after=4)
    losses = [float(str(line["loss"])) for line in log_lines(whole, "step")]
    assert losses[-1] < losses[0]
    assert "teacher   " in (whole / "training.log").read_text()
    other = [f"contrastive.teacher={whole}", *taught[1:], f"trainer.resume_from_checkpoint={whole}/checkpoints/4"]
    with pytest.raises(StartupError, match=r"contrastive.teacher +needs declaring"):
        finetune(contrastive(tmp_path / "other", *other, "trainer.max_steps=8"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    contrastive: Contrastive, tmp_path: Path, variant: str, all_sets: str, pair_files: Path
) -> None:
    replaced = {"ALL_SETS": all_sets, "contrastive.pretraining_dataset=TEXTS": None}
    overrides = [
        replaced.get(x, x) or f"contrastive.pretraining_dataset={pair_files}/texts.jsonl" for x in VARIANTS[variant]
    ]
    whole = tmp_path / "whole"
    finetune(contrastive(whole, *overrides))
    assert [x["step"] for x in log_lines(whole, "step")] == list(range(1, 13))
    for step in (4, 8):
        resumed = tmp_path / f"resumed-{step}"
        resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / str(step)}"
        assert finetune(contrastive(resumed, *overrides, *(FRESH_ONLY if step == 8 else []), resume)).state.step == 12
        assert exact_steps(resumed) == exact_steps(whole, after=step)
        assert log_lines(resumed, "eval")[-1] == log_lines(whole, "eval")[-1]
    last = [load_file(folder / "checkpoints/12/model.safetensors") for folder in (whole, resumed)]
    assert all(bool((last[0][name] == last[1][name]).all()) for name in last[0])


def test_kill_9_and_resume_with_latest(
    contrastive: Contrastive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["trainer.max_steps=18", "trainer.logging_steps=1", "trainer.save_steps=3", "model.dropout_prob=0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config_file = tmp_path / "run.yaml"
    config_file.write_text(config_to_yaml(contrastive(killed, *overrides)))
    finetune(contrastive(whole, *overrides))
    log = killed / "log.jsonl"
    # It does not end by itself while the kill is on its way, however busy the machine is.
    monkeypatch.setenv("NEOBERT_FAULT", "step.done@15:sleep60")
    victim = fork(lambda: int(call("contrastive/finetune.py", config_file)), tmp_path / "printed")
    wait_until(lambda: log.exists() and log.read_text().count('"loss_hex"') >= 8, victim, tmp_path / "printed")
    kill(victim)
    monkeypatch.delenv("NEOBERT_FAULT")
    assert max(int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdecimal()) < 18
    capsys.readouterr()
    assert call("contrastive/finetune.py", config_file, "--trainer.resume_from_checkpoint", "latest") == 0
    assert "steps bit-identical" in capsys.readouterr().out
    assert exact_steps(killed) == exact_steps(whole)


def test_training_lowers_the_loss_and_ranks_the_held_out_pairs(contrastive: Contrastive, tmp_path: Path) -> None:
    out = tmp_path / "run"
    budget = ["trainer.max_steps=40", "trainer.eval_steps=20", "trainer.save_steps=20", "optimizer.lr=2e-3"]
    finetune(contrastive(out, *budget))
    losses = [float(x["loss"]) for x in log_lines(out, "step")]  # type: ignore[arg-type]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    first, *_, last = log_lines(out, "eval")
    assert set(first["sets"]) == {"pairs"}  # type: ignore[call-overload]
    assert set(last["sets"]["pairs"]) == {"ndcg@10", "mrr"}  # type: ignore[index]
    assert last["score"] > first["score"]  # type: ignore[operator]
    assert last["loss"] == pytest.approx(1 - last["score"])  # type: ignore[operator]


def test_it_starts_from_a_pretrained_run_and_takes_its_architecture(
    contrastive: Contrastive, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [f"contrastive.pretrained_checkpoint_dir={pretrained}", "tokenizer.path=null", "trainer.max_steps=1"]
    plain = [f"model.{key}={value}" for key, value in (("hidden_size", 768), ("num_hidden_layers", 12))]
    plain += [
        "model.num_attention_heads=12",
        "model.intermediate_size=3072",
        "model.max_position_embeddings=1024",
        "optimizer.weight_decay=0",
    ]
    config = contrastive(tmp_path / "run", *start, *plain, "optimizer.lr=1e-30")
    finetune(config)
    said = capsys.readouterr().out
    weights = load_file(pretrained / "checkpoints/8/model.safetensors")
    assert (
        f"initial weights from {pretrained}/checkpoints/8 (checkpoint layout after 8 steps): {len(weights)} tensors"
        in said
    )
    after = load_file(tmp_path / "run/checkpoints/1/model.safetensors")
    assert set(after) == set(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    saved = load_config(tmp_path / "run/config.yaml")
    assert (saved.model.hidden_size, saved.model.init_from) == (32, str(pretrained / "checkpoints/8"))
    assert saved.tokenizer.path == str(pretrained / "checkpoints/8/tokenizer")
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert (
        finetune(
            contrastive(
                tmp_path / "moved", *start[:2], *plain, "trainer.max_steps=2", "trainer.resume_from_checkpoint=latest"
            )
        ).state.step
        == 2
    )
    assert load(tmp_path / "moved").embed(["a text"]).shape == (1, 32), "loaded like any checkpoint"


def test_a_learned_temperature_is_kept_and_stays_out_of_the_encoder(contrastive: Contrastive, tmp_path: Path) -> None:
    first = tmp_path / "first"
    finetune(contrastive(first, "contrastive.learn_temperature=true", "trainer.max_steps=4"))
    saved = load_file(first / "checkpoints/4/model.safetensors")
    assert saved["log_scale"].exp().item() != pytest.approx(20, abs=1e-3)
    assert load(first).embed(["a text"]).shape == (1, 32)
    start = [f"contrastive.pretrained_checkpoint_dir={first}", "tokenizer.path=null", "trainer.max_steps=1"]
    finetune(contrastive(tmp_path / "second", *start))
    assert "log_scale" not in load_file(tmp_path / "second/checkpoints/1/model.safetensors")


def test_an_older_step_can_be_named_and_the_card_names_it(
    contrastive: Contrastive, pretrained: Path, tmp_path: Path
) -> None:
    start = [f"contrastive.pretrained_checkpoint_dir={pretrained}", "tokenizer.path=null", "trainer.max_steps=1"]
    finetune(contrastive(tmp_path / "a", *start, "contrastive.pretrained_checkpoint=4"))
    assert load_config(tmp_path / "a/config.yaml").model.init_from == str(pretrained / "checkpoints/4")
    card = (export(ExportRequest(source=str(tmp_path / "a"), output=tmp_path / "out")).folder / "README.md").read_text()
    own, base = card.split("What it started from:")
    assert "- started from the run run, step 4\n" in own
    assert "- loss: InfoNCE for pairs, CoSENT for scored pairs" in own
    assert "- temperature 0.05\n" in own
    assert "- fine-tuned on pairs of pairs.jsonl\n" in own
    assert "- optimizer steps: 1\n" in own
    before = [x for x in log_lines(pretrained, "eval") if x["step"] == 4][-1]
    assert "- optimizer steps: 4\n" in base
    assert f"- held-out loss at step 4: {before['loss']:.4f} nats" in base
    with pytest.raises(StartupError, match=r"pretrained_checkpoint: 5 is no checkpoint of .*; steps there: 4, 8"):
        finetune(contrastive(tmp_path / "b", *start, "contrastive.pretrained_checkpoint=5"))


def test_a_run_among_the_prepared_sets_is_refused(contrastive: Contrastive, tmp_path: Path) -> None:
    config = contrastive(tmp_path / "x")
    run = Path(str(config.dataset.path)) / "all" / "pairs" / "run"
    with pytest.raises(StartupError, match=r"trainer.output_dir: .*pairs/run .*all, where the prepared sets"):
        finetune(replace(config, trainer=replace(config.trainer, output_dir=str(run))))
    assert not run.exists()


def test_what_contradicts_the_checkpoint_is_named(
    contrastive: Contrastive, pretrained: Path, tmp_path: Path, pair_files: Path
) -> None:
    start = f"contrastive.pretrained_checkpoint_dir={pretrained}"
    with pytest.raises(StartupError, match=r"model.num_hidden_layers: the config has 3, .*run/checkpoints/8 has 2"):
        finetune(contrastive(tmp_path / "a", start, "model.num_hidden_layers=3"))
    with pytest.raises(StartupError, match=r"pretrained_checkpoint_dir: .*nowhere is no folder"):
        finetune(contrastive(tmp_path / "b", f"contrastive.pretrained_checkpoint_dir={tmp_path}/nowhere"))
    with pytest.raises(StartupError, match=r"task: pretraining is for `neobert pretrain`; .* task: contrastive"):
        finetune(load_config(pretrained / "config.yaml"))
    with pytest.raises(StartupError, match=r"task: contrastive is for `neobert finetune`"):
        pretrain(contrastive(tmp_path / "c"))
    with pytest.raises(DataError, match=r"loss_type: cosent needs scored pairs, but pairs holds pairs"):
        finetune(contrastive(tmp_path / "d", "contrastive.loss_type=cosent"))
    with pytest.raises(DataError, match="eval_samples: 60 leaves nothing of pairs"):
        finetune(contrastive(tmp_path / "e", "dataset.eval_samples=60"))


def test_sets_that_are_not_prepared_are_named(
    contrastive: Contrastive, tmp_path: Path, pair_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotPrepared, match=r"lacks ALLNLI; it holds labelled, pairs, scored, texts"):
        finetune(contrastive(tmp_path / "a", "dataset.name=ALLNLI"))
    fewer = f"contrastive.sets=[{{name: {pair_files}/pairs.jsonl, max_pairs: 9}}]"
    config = contrastive(tmp_path / "b", "dataset.name=null", fewer)
    with pytest.raises(
        NotPrepared, match=r"was made from \{'name': .*pairs.jsonl'\}, the config says .*'max_pairs': 9"
    ):
        finetune(config)


def test_without_a_name_the_sets_that_are_there_are_trained_on(
    contrastive: Contrastive, tmp_path: Path, pair_files: Path, prepared: Path
) -> None:
    chosen = choose_sets(contrastive(tmp_path, "dataset.name=null"))
    assert [item.key for item, _ in chosen.train] == ["labelled", "pairs", "scored", "texts"]
    scored = f"contrastive.eval_sets=[{{name: {pair_files}/../{pair_files.name}/scored.jsonl}}]"
    chosen = choose_sets(contrastive(tmp_path, "dataset.name=null", scored))
    assert [item.key for item, _ in chosen.train] == ["labelled", "pairs", "texts"]
    with pytest.raises(NotPrepared, match="nothing/all holds no set to train on"):
        choose_sets(contrastive(tmp_path, "dataset.name=null", f"dataset.path={tmp_path / 'nothing'}"))


def test_the_best_checkpoint_is_kept(contrastive: Contrastive, tmp_path: Path) -> None:
    out = tmp_path / "run"
    best = ["trainer.save_best=true", "trainer.save_total_limit=1", "trainer.max_steps=24", "optimizer.lr=3e-2"]
    finetune(contrastive(out, *best))
    scores = {int(x["step"]): float(x["score"]) for x in log_lines(out, "eval") if x["step"]}  # type: ignore[call-overload, arg-type]
    kept = {int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdecimal()}
    assert 24 in kept
    assert kept - {24} <= {step for step, score in scores.items() if score == max(scores.values())}
    assert max(scores, key=lambda step: (scores[step], -step)) in kept or scores[24] == max(scores.values())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_exported_folder_gives_the_same_metric(
    contrastive: Contrastive, tmp_path: Path, pair_files: Path, pooling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand as sentence-transformers does it: the files say how; transformers computes."""
    out, folder = tmp_path / "run", tmp_path / "exported"
    sets = f"contrastive.eval_sets=[{{name: {pair_files}/scored.jsonl}}]"
    prefixes = ["contrastive.anchor_prefix=about: ", "contrastive.positive_prefix=text: "]
    finetune(contrastive(out, sets, "dataset.eval_samples=null", f"contrastive.pooling={pooling}", *prefixes))
    export(ExportRequest(source=str(out), output=folder))
    again = export(ExportRequest(source=str(folder), output=tmp_path / "again")).folder
    for file in ("1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    modes = json.loads((folder / "1_Pooling/config.json").read_text())
    assert [name for name, value in modes.items() if value is True] == [
        {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling]
    ]
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "about: ", "document": "text: "}
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert longest == 32
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def encode(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        vectors = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(vectors, dim=1)

    rows = [json.loads(line) for line in (pair_files / "scored.jsonl").read_text().splitlines()]
    queries = encode([prompts["query"] + row["sentence1"] for row in rows])
    documents = encode([prompts["document"] + row["sentence2"] for row in rows])
    found = spearman((queries * documents).sum(dim=1).numpy(), np.array([row["score"] for row in rows]))
    last = log_lines(out, "eval")[-1]
    assert found == pytest.approx(last["sets"]["scored"]["spearman"], abs=2e-4)  # type: ignore[index]
    capsys.readouterr()
    words = ["--anchor-prefix", "about: ", "--positive-prefix", "text: ", "--pooling", pooling, "--max-length", "32"]
    assert call("contrastive/evaluate.py", str(folder), str(pair_files / "scored.jsonl"), *words) == 0
    assert capsys.readouterr().out == (
        f"{pair_files}/scored.jsonl, 60 rows: spearman {last['sets']['scored']['spearman']:.4f}\n"  # type: ignore[index]
    )
    card = (folder / "README.md").read_text()
    assert f"scored at step 12: spearman {last['sets']['scored']['spearman']:.4f}" in card  # type: ignore[index]
    assert "Compare the vectors of texts by their cosine" in card
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert results == {(key, name): x for key, found in last["sets"].items() for name, x in found.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_an_exported_folder_in_sentence_transformers(
    contrastive: Contrastive, tmp_path: Path, pair_files: Path, pooling: str
) -> None:
    """The package itself, where it is installed."""
    package = pytest.importorskip("sentence_transformers")
    out, folder = tmp_path / "run", tmp_path / "exported"
    sets = f"contrastive.eval_sets=[{{name: {pair_files}/scored.jsonl}}]"
    prefixes = ["contrastive.anchor_prefix=about: ", "contrastive.positive_prefix=text: "]
    finetune(contrastive(out, sets, "dataset.eval_samples=null", f"contrastive.pooling={pooling}", *prefixes))
    export(ExportRequest(source=str(out), output=folder))
    model = package.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    rows = [json.loads(line) for line in (pair_files / "scored.jsonl").read_text().splitlines()]
    queries = model.encode([row["sentence1"] for row in rows], prompt_name="query", normalize_embeddings=True)
    documents = model.encode([row["sentence2"] for row in rows], prompt_name="document", normalize_embeddings=True)
    found = spearman((queries * documents).sum(axis=1), np.array([row["score"] for row in rows]))
    last = log_lines(out, "eval")[-1]
    assert found == pytest.approx(last["sets"]["scored"]["spearman"], abs=2e-4)  # type: ignore[index]
    (verdict,) = verify([(folder, str(out))])
    assert verdict.passed, verdict.describe()
    assert any(check.name == f"sentence-transformers, {pooling} pooling" for check in verdict.checks)
    model.save(str(tmp_path / "saved"))
    before, after = (load_vector_settings(load_encoder_weights(path)) for path in (folder, tmp_path / "saved"))
    assert (after.pooling, after.max_length, dict(after.prompts)) == (pooling, before.max_length, dict(before.prompts))


@pytest.mark.parametrize("name", ["chunks, dropout", "masked language modelling in between"])
def test_master_weights_resume_bit_for_bit(
    contrastive: Contrastive, pair_files: Path, tmp_path: Path, name: str
) -> None:
    keys = [word.replace("TEXTS", f"{pair_files}/texts.jsonl") for word in VARIANTS[name]]
    keys += ["trainer.mixed_precision=bf16", "trainer.bf16_residual=true", "trainer.max_steps=8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(contrastive(whole, *keys, "contrastive.learn_temperature=true"))
    resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / '4'}"
    finetune(contrastive(parts, *keys, "contrastive.learn_temperature=true", resume))
    assert exact_steps(parts) == exact_steps(whole, after=4)
    a, b = (load_file(x / "checkpoints/8/model.safetensors") for x in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
