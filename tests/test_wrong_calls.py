"""Every script answers a wrong call with one sentence that names what is wrong, and exit code 2: never a traceback."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import SCRIPTS, call
from small_corpus import make_texts

from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.train.loop import pretrain

PAIRS = """
task: contrastive
dataset: {name: null, path: sets}
contrastive: {sets: [{name: pairs.jsonl}], pretrained_checkpoint_dir: run}
trainer: {max_steps: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Config], tokenizer_folder: Path) -> Path:
    """A folder with a run and what scripts read."""
    here = tmp_path_factory.mktemp("calls")
    config = tiny(here / "run", "trainer.max_steps=1", "trainer.eval_strategy=no")
    pretrain(config)
    (here / "run.yaml").write_text(config_to_yaml(config))
    (here / "pairs.yaml").write_text(PAIRS)
    (here / "tokenizer").symlink_to(tokenizer_folder)
    lines = [json.dumps({"anchor": text, "positive": text[::-1]}) + "\n" for text in make_texts(20)]
    (here / "pairs.jsonl").write_text("".join(lines))
    (here / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(60)))
    (here / "file").write_text("not a folder\n")
    return here


NEARBY = "does not exist; YAML files nearby: run.yaml, "
CALLS = [
    ("analyze_profile.py none", "none is not there"),
    ("average_checkpoints.py none --output new", "none does not exist; give the folder of a run"),
    ("average_checkpoints.py file --output new", "file is not a folder; give the folder of a run"),
    ("average_checkpoints.py tokenizer --output new", "tokenizer holds no whole checkpoint"),
    ("average_checkpoints.py run --last 1 --output file/new", "--output: file/new cannot be made (Not a directory)"),
    ("benchmark.py --config none.yaml", f"the config file {NEARBY}"),
    ("benchmark.py --config run.yaml model.nothing=1", "model.nothing: unknown key"),
    ("benchmark.py --config run.yaml dataset.path=./none", "dataset.path: ./none does not exist"),
    (
        "benchmark.py --config run.yaml trainer.num_train_epochs=1 datacollator.mlm_probability_final=0.1",
        "trainer.num_train_epochs: 1.0 needs a source of known size",
    ),
    ("benchmark.py --config pairs.yaml", "task: contrastive"),
    ("benchmark.py --device nothing", "argument --device: 'nothing' is unknown; write cpu or cuda"),
    ("benchmark.py --steps 0", "argument --steps: '0': write a number of at least 1"),
    ("benchmark.py --warmup -1", "argument --warmup: '-1': write a number of at least 0"),
    ("benchmark.py --preset tiny --length 2", "--length: 2; write at least 3"),
    ("benchmark.py --preset tiny --vocab-size 3", "--vocab-size: 3; write at least 6"),
    ("benchmark.py --preset tiny --mean-document 0", "--mean-document: 0.0; write at least 1"),
    ("benchmarks/against_transformers.py none --tokenizer tokenizer", "none: there is no such file"),
    ("benchmarks/against_transformers.py text.jsonl --tokenizer ./none", "tokenizer.path: ./none is no folder"),
    ("benchmarks/against_transformers.py text.jsonl --tokenizer tokenizer --preset x", "argument --preset"),
    ("benchmarks/against_transformers.py text.jsonl --tokenizer tokenizer --precision x", "argument --precision"),
    ("benchmarks/against_transformers.py text.jsonl --tokenizer tokenizer --rounds 0", "argument --rounds"),
    ("benchmarks/contrastive.py --device nothing", "device: 'nothing' is unknown"),
    ("benchmarks/inference.py run text.jsonl --repeats 0", "argument --repeats"),
    ("benchmarks/input_pipeline.py ./none --tokenizer tokenizer", "dataset.path: ./none does not exist"),
    ("benchmarks/input_pipeline.py text.jsonl --tokenizer ./none", "tokenizer.path: ./none is no folder"),
    ("benchmarks/input_pipeline.py text.jsonl --tokenizer tokenizer --rows 0", "per_device_train_batch_size: 0"),
    ("benchmarks/input_pipeline.py text.jsonl --tokenizer tokenizer --batches 0", "argument --batches"),
    (
        "benchmarks/loss_kernels.py --kernels torch nothing",
        "--kernels: 'nothing' is unknown; known are reference, torch",
    ),
    ("benchmarks/loss_kernels.py --repeats 0", "argument --repeats"),
    ("benchmarks/loss_kernels.py --device nothing", "argument --device"),
    ("benchmarks/busy_cpu.py --loads 0 -1", "--loads: -1"),
    ("benchmarks/busy_cpu.py --seconds 0", "--seconds: 0.0"),
    ("benchmarks/optimizers.py --device nothing", "argument --device"),
    ("benchmarks/optimizers.py --steps 0", "argument --steps"),
    ("benchmarks/resume_cost.py ./none --tokenizer tokenizer", "dataset.path: ./none does not exist"),
    ("benchmarks/resume_cost.py text.jsonl --tokenizer ./none", "tokenizer.path: ./none is no folder"),
    ("benchmarks/save_cost.py --folder none", "--folder: none is not a folder"),
    ("benchmarks/save_cost.py --hidden-size 65 --num-layers 1", "model.hidden_size 65"),
    ("checkpoint.py list none", "none holds no checkpoint"),
    ("checkpoint.py prune run --keep -1", "--keep: -1"),
    ("contrastive/evaluate.py run none.jsonl", "none.jsonl is not there"),
    ("contrastive/evaluate.py run pairs.jsonl --split test", "pairs.jsonl has no splits, so none is called test"),
    ("contrastive/evaluate.py run pairs.jsonl --max-length 0", "--max-length: 0; write 3 or more"),
    (
        "contrastive/evaluate.py run pairs.jsonl --pooling last",
        "--pooling: 'last' is unknown; write one of mean",
    ),
    ("contrastive/finetune.py none.yaml", f"the config file {NEARBY}"),
    (
        "contrastive/mine_negatives.py run pairs.jsonl --output file/new.jsonl",
        "--output: file/new.jsonl cannot be made (File exists)",
    ),
    ("contrastive/mine_negatives.py run pairs.jsonl --output new.jsonl --max-length 1", "--max-length: 1"),
    ("contrastive/preprocess.py none.yaml", f"the config file {NEARBY}"),
    ("contrastive/preprocess.py none.yaml --shard 3/2", "--shard: '3/2': write i/n"),
    ("embed.py run ./none --output new.npy", "none does not exist"),
    ("evaluation/run_glue.py none.yaml", f"the config file {NEARBY}"),
    ("evaluation/summarize_glue.py none", "none cannot be read"),
    ("evaluation/run_mteb.py run", "one of the arguments --tasks --task-types/--task_types --benchmark is required"),
    ("evaluation/mlm_loss.py ./none text.jsonl", "./none is no checkpoint of ours"),
    ("evaluation/pseudo_perplexity.py run ./none --output new.jsonl", "none does not exist"),
    ("experiments/compare.py none.yaml --data tokenizer", f"none.yaml: the plan {NEARBY}"),
    ("experiments/yardstick.py none.yaml --data tokenizer", f"the config file {NEARBY}"),
    ("experiments/yardstick.py run.yaml --data ./none", "none is no folder; name one with files called train*"),
    ("experiments/yardstick.py run.yaml --data ./none --steps 0", "argument --steps"),
    ("export/export_hf.py none --output new", "none is no folder"),
    ("export/export_hf.py run --output file/new", "--output: file/new cannot be made (Not a directory)"),
    ("export/export_hf.py run --output new --for onyx", "--for: 'onyx' is unknown; write one or more of transformers"),
    ("export/verify.py none", "none is no folder"),
    ("finetuning/finetune.py none.yaml", f"the config file {NEARBY}"),
    ("gpu_check.py --minutes 0", "--minutes: 0.0"),
    ("gpu_check.py --output file", "file: File exists"),
    ("kill_storm.py file", "is not an empty folder"),
    ("kill_storm.py new model.nothing=1", "model.nothing: unknown key"),
    ("kill_storm.py new --life -1", "--life: -1 must be greater than 0"),
    ("kill_storm.py new --into-saves 2", "--into-saves: 2 is not a fraction"),
    ("migrate_config.py none.yaml", f"none.yaml: the file {NEARBY}"),
    ("pipeline.py none.yaml", f"none.yaml cannot be read: the file {NEARBY}"),
    ("predict.py none '[MASK]'", "none is no folder"),
    ("predict.py run --file none", "error: none: No such file or directory"),
    ("pretraining/adapt.py none --text text.jsonl --output new", "none is no folder"),
    ("pretraining/adapt.py run --text ./none --output new", "none does not exist"),
    ("pretraining/adapt.py run --text text.jsonl --output tokenizer", "--output: tokenizer exists already"),
    ("pretraining/adapt.py run --text text.jsonl --output file/new --held-out 9", "file/new cannot be made (Not a"),
    ("pretraining/adapt.py run --text text.jsonl --output new --held-out 60", "--held-out: 60"),
    ("pretraining/adapt.py run --text text.jsonl --output new --init best", "--init: 'best' is unknown; write one of"),
    ("pretraining/adapt.py run --text text.jsonl --output new --general-fraction 1", "--general-fraction: 1.0"),
    ("pretraining/adapt.py run --text text.jsonl --output new --nothing 1", "nothing: unknown key"),
    ("pretraining/adapt.py run --text text.jsonl --output new --trainer.nothing 1", "trainer.nothing: unknown key"),
    ("pretraining/longer_seq.py run.yaml --checkpoint none --max-length 128", "--checkpoint: none is neither"),
    (
        "pretraining/longer_seq.py run.yaml --checkpoint run --max-length 128 --output file --trainer.max_steps 2",
        "Not a directory",
    ),
    ("pretraining/preprocess.py none.yaml", f"the config file {NEARBY}"),
    ("pretraining/preprocess.py pairs.yaml", "task: contrastive is for neobert preprocess-pairs"),
    ("pretraining/pretrain.py none.yaml", f"the config file {NEARBY}"),
    (
        "pretraining/tokenize_dataset.py --dataset text.jsonl --tokenizer tokenizer --output new --dataset-config en",
        "--dataset-config: en belongs to a dataset of the hub, which text.jsonl is not; remove it",
    ),
    ("pretraining/tokenize_dataset.py --dataset ./none --tokenizer tokenizer --output new", "none does not exist"),
    ("pretraining/train_tokenizer.py --input ./none --output new", "none does not exist"),
    ("pretraining/train_tokenizer.py --input text.jsonl --output file", "--output: file is not a folder"),
    ("serve.py none --port 0", "none is no folder"),
    ("serve.py run --port 99999", "--port: 99999"),
    ("serve.py run --port 0 --max-texts 0", "--max-texts: 0; write a positive number"),
    ("prove.py none", "none holds no log.jsonl; name the output folder of a run"),
    ("prove.py run", "run has 1 checkpoint(s), so there are no steps between two; --from-start"),
    ("prove.py run --samples 0", "argument --samples: '0': write a number of at least 1"),
    ("replay.py none --row 0", "none holds no checkpoint"),
    ("replay.py run --row -1", "--row: -1; rows are counted from 0"),
]


def test_every_script_is_called() -> None:
    called = {words.split()[0] for words, _ in CALLS}
    assert called == {str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.py")}


@pytest.mark.parametrize(("words", "said"), CALLS, ids=[words for words, _ in CALLS])
def test_a_wrong_call_is_one_sentence(
    words: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *rest = shlex.split(words)
    # What a script sets for its own process must not outlive this test.
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("neobert.benchmark.trial.limit_threads", lambda count: None)
    monkeypatch.chdir(folder)
    code = call(script, *rest)
    error = capsys.readouterr().err
    assert (code, said in error) == (2, True), error
    assert not (folder / "new").exists()
