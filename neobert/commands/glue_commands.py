"""Commands that score an encoder by fine-tuning it on the tasks of GLUE. Libraries are imported after the arguments are
read."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neobert import cli
from neobert.commands.flags import add_json, build_parser, check_one_process, print_answer
from neobert.commands.training_commands import parse_command_line
from neobert.config.load import split_arguments
from neobert.config.schema import Config
from neobert.config.shipped import SHIPPED
from neobert.errors import CallError

_EVERYTHING = "all"
"""The shipped config of a call that names none."""


def glue(program: str, argv: list[str]) -> None:
    """Fine-tune models on the tasks of GLUE: `neobert glue [CONFIG] [MODEL ...] [--section.key value ...]`.

    A MODEL replaces glue.model: a run, a checkpoint, an exported folder, a name of the hub, random:MODEL or bag:MODEL.
    Finished cells are skipped, so the same command resumes. Writes results.json into trainer.output_dir, with several
    models into a folder of each.
    """
    configs = parse_glue(argv, program=program)
    check_one_process("cells")
    from neobert.glue.score_table import describe_results
    from neobert.glue.side_by_side_scores import compare_results
    from neobert.glue.suite import run_suite

    found = []
    for config in configs:
        found.append(run_suite(config, say=cli.say))
        cli.print_result(describe_results(found[-1]))
        minutes = found[-1]["seconds"] / 60
        cli.say(f"{minutes:.1f} minutes of training; {config.trainer.output_dir}/results.json has everything")
    if len(found) > 1:
        cli.print_result(f"\n{compare_results(found)}")


def parse_glue(argv: Sequence[str], *, program: str) -> list[Config]:
    """A config for each model.

    Raises:
        CallError: the arguments cannot be read, or two models would write into one folder.
        ConfigError: the config cannot be used.
    """
    if any(argument in ("--help", "-h") for argument in argv):
        return [parse_command_line(argv, description=glue.__doc__, program=program)]
    overrides, others = split_arguments([argument for argument in argv if argument != "--print-config"])
    files = [name for name in others if _is_config(name) or name.startswith("-")]
    models = [name for name in others if name not in files]
    rest = [*(files or [_EVERYTHING]), *(f"--{key}" if text is None else f"--{key}={text}" for key, text in overrides)]
    rest += ["--print-config"] if "--print-config" in argv else []
    configs = [
        parse_command_line([*rest, *chosen], description=glue.__doc__, program=program)
        for chosen in [[f"--glue.model={model}"] for model in models] or [[]]
    ]
    if configs[0].task != "glue":
        raise CallError(f"task: {configs[0].task} is not for {program}; write task: glue, as configs/glue/all.yaml")
    return configs if len(models) < 2 else _separate(configs)


def _is_config(name: str) -> bool:
    path = Path(name)
    return path.suffix in (".yaml", ".yml") or path.is_file() or (name in SHIPPED and not path.is_dir())


def _separate(configs: Sequence[Config]) -> list[Config]:
    """The configs with a folder for each model in their output folder."""
    names = [re.sub(r"[^\w.-]+", "_", str(config.glue.model)).strip("_") for config in configs]
    if len(set(names)) < len(names):
        raise CallError(f"two of the models are called alike: {', '.join(names)}; name each once")
    return [
        replace(config, trainer=replace(config.trainer, output_dir=str(Path(config.trainer.output_dir) / name)))
        for config, name in zip(configs, names)
    ]


def summarize_glue(program: str, argv: list[str]) -> None:
    """Compare results of neobert glue side by side: `neobert summarize-glue FOLDER ...`.

    Scores that were made by different protocols never share a column; what they differ in is named.
    """
    parser = build_parser(program, summarize_glue.__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="output folders of neobert glue, or their results.json")
    add_json(parser, "print the results as one JSON object, by folder")
    args = parser.parse_args(argv)
    from neobert.glue.side_by_side_scores import compare_results, load_results

    runs = {str(path): load_results(path) for path in args.results}
    print_answer(runs, compare_results(list(runs.values())), as_json=args.json)
