"""The data that a config names, tokenised once, before the run that trains on it."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neobert import cli
from neobert.config.load import split_arguments
from neobert.config.schema import Config
from neobert.data.pipeline import build_tokenizer
from neobert.data.store.offline import PreparedSource, data_overrides, name_tokenizer, prepare_sources
from neobert.data.tokenizer import limit_threads
from neobert.secrets import hide_credentials


def prepare(config: Config, config_name: str) -> tuple[list[PreparedSource], list[str]]:
    """Tokenises what the run of this config would read, and gives the overrides with which it reads that.

    Raises:
        DataError: a source or the tokenizer cannot be used as configured.
    """
    output, config = choose_output(config, config_name)
    limit_threads(config.dataset.num_proc)
    tokenizer = build_tokenizer(config, None, output)
    if tokenizer.note is not None:
        cli.say(f"warning: {tokenizer.note}")
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
    return shlex.join(["neobert", "pretrain", *map(hide_credentials, [*words, *pairs])])


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
