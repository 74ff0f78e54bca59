"""Rules about `distill` and `contrastive.teacher`; see `rules`."""

from collections.abc import Iterator

from neobert.config.schema import Config


def check_distill(config: Config) -> Iterator[str]:
    """A teacher, and something to learn from it."""
    if config.trainer.objective == "distill":
        yield from _check_teacher("distill.teacher", config.distill.teacher, "trainer.objective: distill", config)
        yield from _check_losses(config)
    if config.contrastive.loss_type == "distill":
        teacher = config.contrastive.teacher
        yield from _check_teacher("contrastive.teacher", teacher, "contrastive.loss_type: distill", config)
        if config.contrastive.pooling == "tokens":
            yield (
                "contrastive.pooling: tokens makes no vector of a text, which contrastive.loss_type: distill compares;"
                " write mean, cls or max"
            )


def _check_teacher(key: str, teacher: str | None, needed_by: str, config: Config) -> Iterator[str]:
    if teacher is None:
        yield f"{key}: null, but {needed_by} learns from a trained encoder; name its run, checkpoint or folder"
    if config.tokenizer.train:
        yield (
            f"tokenizer.train: true makes a new vocabulary, but {key} needs that of its teacher; write false, and"
            " tokenizer.path: null takes the teacher's"
        )


def _check_losses(config: Config) -> Iterator[str]:
    section, trainer = config.distill, config.trainer
    if section.logits_weight == 0 and section.hidden_weight == 0:
        yield (
            "distill.logits_weight: 0 beside distill.hidden_weight = 0 leaves nothing to learn from the teacher; raise"
            " one of them, or write trainer.objective: mlm"
        )
    final = config.datacollator.mlm_probability_final
    if section.hidden_weight and final is not None:
        yield (
            f"datacollator.mlm_probability_final: {final} changes the number of targets, which distill.hidden_weight ="
            f" {section.hidden_weight} is measured against; write null, or 0 for the weight"
        )
    if trainer.z_loss:
        yield f"trainer.z_loss: {trainer.z_loss} is no part of the loss of trainer.objective: distill; write 0"
    if not trainer.masked_logits_only_loss:
        yield (
            "trainer.masked_logits_only_loss: false has no form with trainer.objective: distill, which compares"
            " predictions of the masked tokens alone; write true"
        )
