"""The commands of `neobert NAME ...`; every script of `scripts/` is one of them.

`neobert --help` reads this table alone, and a command reads its flags before it imports what it needs, so both answer
at once.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from neobert import cli
from neobert.errors import CallError
from neobert.host import prepare_threads


@dataclass(frozen=True, slots=True)
class Command:
    """What a command is called with `argv`, and how it ends."""

    help: str
    """One line."""

    module: str
    """Below `neobert.commands`; its function of the command's name is called with (program, argv)."""

    script: str | None
    """The same command below `scripts/`."""

    also: tuple[type[Exception], ...] = ()
    """Errors beside UserError that are the user's to correct."""

    others: tuple[str, ...] = ()
    """Further scripts that are the same command."""

    resumes: bool = False
    """The same command continues where it was, after an interruption or a full disk."""


def main() -> NoReturn:
    """`neobert NAME ...`, of which `python -m neobert` is another spelling."""
    name, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in COMMANDS:
        run_command(name, program=f"neobert {name}", argv=argv)
    cli.run(partial(_list_commands, name))


def run_command(name: str, *, program: str | None = None, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and ends the process; called by a script with its name alone.

    Args:
        program: what was typed before the arguments; by default the script's file.
        argv: by default those after the script.
    """
    command = COMMANDS[name]

    def call() -> int | None:
        prepare_threads()  # Before anything imports torch.
        # After cli.run has started: the log handlers of libraries keep the streams that they find.
        function = getattr(importlib.import_module(f"neobert.commands.{command.module}"), name.replace("-", "_"))
        code: int | None = function(
            f"python {sys.argv[0]}" if program is None else program, list(sys.argv[1:] if argv is None else argv)
        )
        return code

    cli.run(call, also=command.also, resumes=command.resumes)


def _list_commands(name: str) -> int:
    if name and name not in ("--help", "-h"):
        close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise CallError(f"{name}: there is no such command; {meant}`neobert --help` lists them")
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    cli.print_result("\n".join(["usage: neobert NAME ...; neobert NAME --help", "", *lines]))
    return 0 if name else cli.EXIT_CODES["wrong_call"]


COMMANDS: dict[str, Command] = {
    "pretrain": Command("pretrain an encoder", "training_commands", "pretraining/pretrain.py"),
    "preprocess": Command(
        "tokenise the data of a config once, before the run",
        "training_commands",
        "pretraining/preprocess.py",
        resumes=True,
    ),
    "tokenize-dataset": Command(
        "tokenise a dataset into a folder that pretraining reads by index",
        "training_commands",
        "pretraining/tokenize_dataset.py",
        resumes=True,
    ),
    "train-tokenizer": Command(
        "train a tokenizer on any text source", "training_commands", "pretraining/train_tokenizer.py"
    ),
    "longer-seq": Command(
        "continue a run at a longer context, on documents that are long enough for it",
        "training_commands",
        "pretraining/longer_seq.py",
        resumes=True,
    ),
    "adapt": Command(
        "adapt an encoder to a domain or a language: new tokens, then training on own and general text",
        "training_commands",
        "pretraining/adapt.py",
        also=(ValueError,),
        resumes=True,
    ),
    "finetune": Command(
        "fine-tune an encoder on labels or on pairs",
        "training_commands",
        "finetuning/finetune.py",
        others=("contrastive/finetune.py",),
    ),
    "preprocess-pairs": Command(
        "prepare the sets of a contrastive config", "training_commands", "contrastive/preprocess.py", resumes=True
    ),
    "mine-negatives": Command(
        "find hard negatives for pairs with an encoder",
        "model_commands",
        "contrastive/mine_negatives.py",
        also=(OSError, ValueError),
    ),
    "pipeline": Command(
        "run a list of stages, each from what the one before it made", "training_commands", "pipeline.py"
    ),
    "doctor": Command("say what this machine can do, and whether a training can start here", "doctor_command", None),
    "config": Command("list the shipped configs, or copy one out", "training_commands", None),
    "migrate-config": Command("rewrite a config of other NeoBERT code", "training_commands", "migrate_config.py"),
    "predict": Command(
        "fill the masks of texts, or of a file of them, with a trained model",
        "model_commands",
        "predict.py",
        also=(OSError, ValueError),
    ),
    "embed": Command(
        "embed texts with a trained model", "model_commands", "embed.py", also=(ValueError,), resumes=True
    ),
    "serve": Command(
        "answer embeddings and filled masks over HTTP, as OpenAI's clients ask",
        "export_commands",
        "serve.py",
        also=(ValueError,),
    ),
    "mlm-loss": Command(
        "masked-token loss of a model on any text",
        "model_commands",
        "evaluation/mlm_loss.py",
        also=(OSError, ValueError),
    ),
    "pseudo-perplexity": Command(
        "pseudo-perplexity of texts",
        "model_commands",
        "evaluation/pseudo_perplexity.py",
        also=(ValueError,),
        resumes=True,
    ),
    "evaluate-pairs": Command(
        "evaluate embeddings of any model on any set of pairs",
        "model_commands",
        "contrastive/evaluate.py",
        also=(ValueError,),
    ),
    "mteb": Command(
        "evaluate an encoder on tasks of MTEB, or on local sets of the same kinds",
        "model_commands",
        "evaluation/run_mteb.py",
        also=(ValueError,),
        resumes=True,
    ),
    "glue": Command(
        "fine-tune models on the tasks of GLUE, with a grid and seeds",
        "glue_commands",
        "evaluation/run_glue.py",
        resumes=True,
    ),
    "summarize-glue": Command("compare results of glue side by side", "glue_commands", "evaluation/summarize_glue.py"),
    "export": Command(
        "export an encoder to a folder for transformers, sentence-transformers and the hub",
        "export_commands",
        "export/export_hf.py",
    ),
    "verify-export": Command(
        "check that an exported folder, loaded with transformers, matches our model",
        "export_commands",
        "export/verify.py",
    ),
    "report": Command("one page about a run, or about several beside each other", "report_runs", None),
    "average-checkpoints": Command(
        "average the last checkpoints of a run", "export_commands", "average_checkpoints.py"
    ),
    "checkpoint": Command("verify, list, compare and prune checkpoints", "model_commands", "checkpoint.py"),
    "replay": Command("print a row of a run by its number", "model_commands", "replay.py"),
    "prove": Command(
        "make random steps of a run again, and compare them and its checkpoints with its record", "prove", "prove.py"
    ),
    "analyze-profile": Command("where the time of profiled steps went", "benchmark_commands", "analyze_profile.py"),
    "benchmark": Command(
        "tokens per second, utilisation and memory of the training step",
        "benchmark_commands",
        "benchmark.py",
        also=(ValueError,),
    ),
    "benchmark-transformers": Command(
        "the training step against a plain loop on transformers (CPU)",
        "benchmark_commands",
        "benchmarks/against_transformers.py",
        also=(ValueError,),
    ),
    "benchmark-busy": Command(
        "the training step beside other programs, by how threads wait",
        "machine_commands",
        "benchmarks/busy_cpu.py",
    ),
    "benchmark-contrastive": Command(
        "pairs per second and peak memory of contrastive steps",
        "benchmark_commands",
        "benchmarks/contrastive.py",
        also=(ValueError,),
    ),
    "benchmark-inference": Command(
        "tokens per second of a model, against transformers with padded batches",
        "benchmark_commands",
        "benchmarks/inference.py",
        also=(OSError, ValueError),
    ),
    "benchmark-input": Command(
        "tokens per second and fill of the input pipeline, against datasets.map",
        "benchmark_commands",
        "benchmarks/input_pipeline.py",
    ),
    "benchmark-loss": Command(
        "time and memory of the loss kernels", "benchmark_commands", "benchmarks/loss_kernels.py", also=(ValueError,)
    ),
    "benchmark-optimizers": Command(
        "time of every optimizer's step, and how orthogonal Muon's updates are",
        "benchmark_commands",
        "benchmarks/optimizers.py",
    ),
    "benchmark-resume": Command(
        "seconds to the first batch of a resumed run", "benchmark_commands", "benchmarks/resume_cost.py"
    ),
    "benchmark-save": Command(
        "what a checkpoint costs to save and to load", "benchmark_commands", "benchmarks/save_cost.py"
    ),
    "size": Command(
        "memory, speed and days of a config on GPUs that are not here, computed",
        "cluster_commands",
        None,
        also=(ValueError,),
    ),
    "benchmark-ranks": Command("what the data of a run costs each of many ranks, simulated", "cluster_commands", None),
    "gpu-check": Command(
        "try and measure everything on a GPU once, in minutes", "machine_commands", "gpu_check.py", resumes=True
    ),
    "compare": Command(
        "train the runs of a plan one by one and compare them", "benchmark_commands", "experiments/compare.py"
    ),
    "yardstick": Command(
        "how much a config learns in seven minutes of training", "benchmark_commands", "experiments/yardstick.py"
    ),
    "ladder": Command(
        "train small sizes of the dial, and predict the loss of a larger one",
        "ladder_command",
        None,
        also=(ValueError,),
        resumes=True,
    ),
    "speedrun": Command(
        "set, verify and list records: the lowest held-out loss in a fixed time or number of row slots",
        "speedrun_commands",
        None,
        resumes=True,
    ),
    "kill-storm": Command(
        "kill a run at random instants, and compare it with one left alone", "benchmark_commands", "kill_storm.py"
    ),
}
"""In the order of `neobert --help`."""
