"""The command `preprocess.py`: the data that a config names, tokenised once, before the run that trains on it."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neobert.config.command_line import parse_command_line
from neobert.config.load import split_arguments
from neobert.config.schema import Config
from neobert.data.encode import limit_threads
from neobert.data.errors import DataError
from neobert.data.offline import PreparedSource, data_overrides, name_tokenizer, prepare_sources
from neobert.data.pipeline import build_tokenizer
from neobert.data.report import write_report
from neobert.train.preview import preview
from neobert.train.runtime import StartupError

_FLAGS = ("--debug", "--report")
_TRACES = (".tmp-*/progress.json", "*/manifest.json", "tokenizer/trained_from.txt")
"""What this command leaves in its output, in any of which it goes on."""


def run_preprocess(argv: Sequence[str], description: str) -> int:
    """Does what the words of the command line say; returns the exit code."""
    words = [word for word in argv if word not in _FLAGS]
    config = parse_command_line(words, description=description)
    if config.task != "pretraining":
        print(f"error: task: {config.task} is for scripts/{config.task}/preprocess.py", file=sys.stderr)
        return 2
    try:
        if "--debug" in argv:
            print(preview(config))
            return 0
        prepared, overrides = prepare(config, choose_config_name(words))
    except (DataError, StartupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; mend that, and the same command goes on where it was", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    for source in prepared:
        for note in source.inventory.notes():
            print(f"{source.spec.label}: {note}")
        for text in source.inventory.warnings():
            print(f"warning: {text}", file=sys.stderr)
        for split, manifest in source.manifests.items():
            print(
                f"{source.folder / split}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens; "
                f"{manifest['bad']} records could not be read, {manifest['skipped']} had no text"
            )
            if "--report" in argv:
                print(write_report(source.folder / split, config.dataset.max_seq_length).text)
    print("train on it with:")
    print(write_command(words, overrides))
    return 0


def prepare(config: Config, config_name: str) -> tuple[list[PreparedSource], list[str]]:
    """Tokenises what the run of this config would read, and gives the overrides with which it reads that.

    Raises:
        DataError: a source or the tokenizer cannot be used as configured.
    """
    output, config = choose_output(config, config_name)
    limit_threads(config.dataset.num_proc)
    tokenizer = build_tokenizer(config, None, output)
    trained = config.tokenizer.train
    name = "trained" if trained else name_tokenizer(config.tokenizer)
    prepared = prepare_sources(config.dataset, tokenizer, output, tokenizer_name=name)
    overrides = data_overrides(prepared, config.dataset)
    if trained:
        overrides += ["tokenizer.train=false", f"tokenizer.path={output / 'tokenizer'}"]
        overrides += [f"tokenizer.{key}=null" for key in ("vocab_size", "train_documents")]
    return prepared, overrides


def choose_output(config: Config, config_name: str) -> tuple[Path, Config]:
    """Where the tokens go, and the config of what is tokenised.

    `dataset.pre_tokenize_output`, else `dataset.path` where `dataset.name` is the source and nothing else is at that
    path, else `tokenized_data/<name of the config file>`.
    """
    section = config.dataset
    if isinstance(section.path, str) and section.name is not None and _is_free(Path(section.path)):
        source = replace(config, dataset=replace(section, path=None))
        return Path(section.pre_tokenize_output or section.path), source
    return Path(section.pre_tokenize_output or f"tokenized_data/{config_name}"), config


def write_command(words: Sequence[str], overrides: Sequence[str]) -> str:
    """The line that trains with a command line's `words` and more overrides, `key=value` each."""
    pairs = [part for override in overrides for part in ("--" + override).split("=", maxsplit=1)]
    return shlex.join(["python", "scripts/pretraining/pretrain.py", *words, *pairs])


def choose_config_name(words: Sequence[str]) -> str:
    """The config file of a command line, without folder and ending."""
    return Path(split_arguments(words)[1][0]).stem


def _is_free(path: Path) -> bool:
    """Nothing is there, or what this command has written, finished or not."""
    if "://" in str(path) or "*" in str(path):
        return False
    return not path.exists() or any(
        next(path.glob(pattern), None)
        for pattern in (".tmp-*/progress.json", "*/manifest.json", "tokenizer/trained_from.txt")
    )
