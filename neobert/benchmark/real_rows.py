"""Rows of a run's own data for the step benchmark, through the loader that training has."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from neobert.benchmark.step_time import RowSource
from neobert.config.load import ConfigError, load_config
from neobert.data.pipeline import Reader, build_tokenizer
from neobert.errors import StartupError
from neobert.objectives.table import choose_objective
from neobert.train.build import build_config_data, build_model_config
from neobert.types import PackedBatch


@contextmanager
def open_rows(path: str, overrides: Sequence[str], *, pin_memory: bool) -> Iterator[RowSource]:
    """The micro-batches of the config at `path`, from its first row on, and the model that belongs to them.

    Raises:
        ValueError: the config, or the data that it names, cannot be used; a DataError also while the rows are read.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = load_config(path, overrides)
            objective = choose_objective(config)
            if objective.reads != "documents":
                raise ValueError(
                    f"{path}: task: {config.task} reads {objective.reads}; only rows of documents are measured"
                )
            rows = config.trainer.micro_batch_rows
            tokenizer = build_tokenizer(config, None, Path(folder))
            reader = Reader(rows_per_step=rows, prepared_dir=Path(folder) / "tokenized", pin_memory=pin_memory)
            data = build_config_data(config, tokenizer, reader)
        except (ConfigError, StartupError) as error:
            raise ValueError(str(error)) from error
        loader = data.loader()
        try:
            yield RowSource(
                model=build_model_config(config, tokenizer),
                objective=objective,
                batches=(batch for step in loader for batch in step.micro_batches if isinstance(batch, PackedBatch)),
                name=f"{rows} rows of {config.dataset.max_seq_length} of {path}",
                real=True,
            )
        finally:
            loader.close()
