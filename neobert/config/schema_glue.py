"""Keys of `glue`: how good an encoder is, by fine-tuning it on the tasks of GLUE."""

from dataclasses import dataclass
from typing import Literal

from neobert.key import key


@dataclass(frozen=True, kw_only=True, slots=True)
class GlueSection:
    """Fine-tuning on the tasks of GLUE (`task: glue`), once for each task, point of a grid and seed. Nothing here is
    resumed: a cell that is finished is skipped as long as all that decides its score is the same."""

    model: str | None = key(None, path=True, resume="free")
    """The encoder: a run folder, one of its checkpoints, an exported folder or a name of the hub. `random:MODEL` is the
    architecture and tokenizer of a model with random weights, `bag:MODEL` its embedding matrix without the encoder."""

    allow_random_weights: bool = key(False, resume="free")
    """true: without `model`, random weights of section `model` and the tokenizer of `tokenizer`."""

    data_dir: str | None = key(None, path=True, resume="free")
    """A folder with a folder for each task: files that start with the names of its splits (`cola/train.jsonl.gz`,
    `mnli/validation_matched.parquet`, ...), or what `save_to_disk` wrote. null: they are fetched from the hub
    (nyu-mll/glue) into `<trainer.output_dir>/data` once."""

    tasks: tuple[str, ...] = key(
        ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"), resume="free"
    )
    """The tasks, in the order they are fine-tuned; ax is the diagnostic set, which the models of mnli answer."""

    grid: Literal["small", "full"] = key("small", resume="free")
    """Learning rates, batch sizes and epochs that are tried. small: 3e-5, 1e-4 and 3e-4 with rows of 32, 4 epochs.
    full: 1e-5, 2e-5 and 3e-5 with 16 and 32 rows, 10 epochs. `trainer.num_train_epochs` or `max_steps` replaces the
    epochs."""

    learning_rates: tuple[float, ...] = key((), above=0, resume="free")
    """Instead of those of the grid."""

    batch_sizes: tuple[int, ...] = key((), at_least=1, resume="free")
    """Rows of a step, instead of those of the grid."""

    seeds: int = key(3, at_least=1, resume="free")
    """How many seeds: `seed`, `seed` + 1, ... . Mean and standard deviation are over them."""

    transfer_from_task: bool = key(False, resume="free")
    """true: rte, mrpc and stsb start from the best model of mnli, which must be among the tasks."""
