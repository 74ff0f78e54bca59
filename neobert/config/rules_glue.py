"""Rules about `glue`; see `rules`."""

from collections.abc import Iterator

from neobert.config.fields import FIELDS
from neobert.config.schema import Config
from neobert.key import show_value

OF_THE_SUITE = {
    "dataset.path": "glue.data_dir is the folder with the tasks",
    "dataset.name": "glue.data_dir: null reads the tasks from the hub",
    "dataset.eval_samples": "all rows of a validation split count",
    "finetune.model": "write glue.model",
    "finetune.allow_random_weights": "write glue.allow_random_weights",
    "finetune.kind": "it follows from the task",
    "finetune.text_column": "it follows from the task",
    "finetune.pair_column": "it follows from the task",
    "finetune.label_column": "it follows from the task",
    "finetune.labels": "they follow from the task",
    "finetune.metric": "it follows from the task",
    "finetune.seeds": "write glue.seeds",
    "optimizer.lr": "write glue.learning_rates",
    "trainer.global_batch_size": "write glue.batch_sizes",
    "trainer.gradient_accumulation_steps": "write glue.batch_sizes",
    "trainer.eval_strategy": "every cell is evaluated once an epoch",
    "trainer.eval_steps": "every cell is evaluated once an epoch",
    "trainer.save_model": "a cell saves after every epoch, and keeps nothing when it is finished",
    "trainer.save_strategy": "a cell saves after every epoch, and keeps nothing when it is finished",
    "trainer.save_steps": "a cell saves after every epoch, and keeps nothing when it is finished",
    "trainer.save_best": "a cell saves after every epoch, and keeps nothing when it is finished",
    "trainer.save_total_limit": "a cell saves after every epoch, and keeps nothing when it is finished",
    "trainer.resume_from_checkpoint": "the same command resumes",
    "trainer.overwrite_output_dir": "remove the folder, or name another one in trainer.output_dir",
}
"""Keys that the suite sets for every cell -> what to do instead."""


def check_glue(config: Config) -> Iterator[str]:
    """Everything about the suite."""
    if config.task != "glue":
        return
    section = config.glue
    if section.model is None and not section.allow_random_weights:
        yield (
            "glue.model: null; name a run, a checkpoint, an exported folder or a model of the hub, or write"
            " glue.allow_random_weights: true for random weights of section model"
        )
    elif section.model is not None and section.allow_random_weights:
        yield (
            f"glue.allow_random_weights: true is set beside glue.model = {section.model}; write glue.model"
            f" random:{section.model} for random weights of its architecture, or remove one of the two"
        )
    if not section.tasks:
        yield "glue.tasks: is empty; name a task, for example [cola, sst2]"
    for key, instead in OF_THE_SUITE.items():
        value = FIELDS[key].value_in(config)
        if value != FIELDS[key].default:
            yield f"{key}: {show_value(value)} is not read with task: glue, {instead}; remove it"
