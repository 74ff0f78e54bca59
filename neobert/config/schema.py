"""Every key of a config file: its name, type, default and meaning. The only list of keys; those of an architecture come
from `neobert.model.config`.

A config file has one mapping per section below, plus `task` and `seed`. The text under each field is its
documentation: `--help` and docs/configuration.md are made from it. `neobert.config.load` turns YAML into a `Config`,
which is frozen: a value derived from it lives in the object that derived it.
"""

from dataclasses import dataclass, field
from typing import Literal

from neobert.config.schema_contrastive import ContrastiveSection
from neobert.config.schema_data import PREDICTS_TOKENS, DatacollatorSection, DatasetSection, TokenizerSection
from neobert.config.schema_distill import DistillSection
from neobert.config.schema_finetune import FinetuneSection
from neobert.config.schema_glue import GlueSection
from neobert.config.schema_optimizer import OptimizerSection
from neobert.config.schema_trainer import TrainerSection
from neobert.key import key, section
from neobert.model.config import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection(Architecture):
    """The encoder to train. The vocabulary and the padding id come from the tokenizer."""

    name: str | None = key(None, resume="free")
    """A label: shown in the model summary, and the run's name in wandb when `wandb.name` is null."""

    # A resume has weights and architecture from its checkpoint: free, as what follows and all initial weights.
    init_from: str | None = key(None, path=True, resume="free")
    """Initial weights of a fresh run: a run or checkpoint folder, an exported folder, or a model of the hub
    (`owner/model`, `owner/model@revision`) of a family that docs/export.md lists. Its architecture is used where the
    keys of `model` are not set; a key that is set must match it. Its tokenizer is used where none is named or trained;
    with another one, embeddings are copied by the text of the tokens. A run that is resumed has all of it from its
    checkpoint."""

    init_weights: Literal["model", "ema"] = key("model", needs="model.init_from", resume="free")
    """With `init_from`: ema takes the moving average of a checkpoint of ours instead of its weights."""

    init_layers: tuple[int, ...] = key((), at_least=0, needs="model.init_from", tasks="pretraining", resume="free")
    """Start from these layers of `init_from`, counted from 0, in this order: `[0, 3]` makes two layers of six. Empty:
    all of them. The rest of the architecture stays."""

    init_tile: bool = key(False, needs="model.init_from", resume="free")
    """true: `init_from` may be smaller (fewer layers, narrower, heads of the same width): its weights are repeated to
    fill this model, see docs/training.md. Give the larger sizes; the rest of the architecture is the source's."""

    init_drop_decoder_bias: bool = key(False, needs="model.init_from", tasks="pretraining", resume="free")
    """true: leave out the bias that the vocabulary projection of `init_from` may have (published NeoBERT has one)."""

    decoder_bias_init: Literal["zeros", "log_frequency"] = key(
        "zeros",
        needs=("model.decoder_bias", "model.init_from=null", PREDICTS_TOKENS),
        tasks="pretraining",
        resume="free",
    )
    """Where `decoder_bias` starts. log_frequency: at the logarithms of the frequencies of tokens in the training data,
    so that the loss starts near that of a model which knows only these, instead of at that of a guess. Every token
    counts once more than it occurs."""

    vocab_size: int | None = key(None, at_least=1, resume="fixed")
    """Rows of the embedding. null: the tokenizer's size rounded up to a multiple of 128. Smaller than the tokenizer is
    an error, larger is kept."""

    # Free: the same attention and loss, rounded differently.
    attn_backend: Literal["auto", "sdpa", "flash_attn_varlen", "flex"] = key("auto", resume="free")
    """auto takes `flash_attn_varlen` where it can run (CUDA, bf16) and `sdpa` elsewhere; the log names the choice.
    A backend named here that cannot run is an error. `flex` is torch's FlexAttention, for CUDA."""

    kernel_backend: Literal["auto", "torch", "triton", "liger"] = key("auto", needs=PREDICTS_TOKENS, resume="free")
    """What computes the loss from hidden states and vocabulary: auto takes `triton` on CUDA where it can be imported,
    else `torch`; the log names the choice. A kernel named here that cannot run is an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSection:
    """Learning rate: linear warm-up, then a decay that ends at `final_lr_ratio` and stays there."""

    # A schedule may change without being declared, so that decays branch off a trunk and runs grow; the log says so.
    name: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = key("cosine", resume="schedule")
    """cosine and linear decay from the warm-up on. wsd is stable until its cool-down. constant and inverse_sqrt last
    forever, or until a cool-down if there is one; inverse_sqrt does not fall below `final_lr_ratio`."""

    warmup_steps: int = key(2000, at_least=0, resume="schedule")
    """Steps until the peak learning rate is reached."""

    warmup_percent: float | None = key(None, at_least=0, at_most=100, resume="schedule")
    """Warm-up as a percentage (0 to 100) of `total_steps`; wins over `warmup_steps`."""

    decay_steps: int | None = key(
        None,
        at_least=1,
        needs="scheduler.name=cosine|linear|wsd or scheduler.cooldown_steps or scheduler.cooldown_percent",
        resume="schedule",
    )
    """The step at which the decay ENDS, counted from the start of the run; null is `total_steps`."""

    decay_percent: float | None = key(
        None,
        at_least=0,
        at_most=100,
        needs="scheduler.name=cosine|linear|wsd or scheduler.cooldown_steps or scheduler.cooldown_percent",
        resume="schedule",
    )
    """End of the decay as a percentage (0 to 100) of `total_steps`; wins over `decay_steps`."""

    cooldown_steps: int | None = key(
        None, at_least=1, needs="scheduler.name=wsd|constant|inverse_sqrt", resume="schedule"
    )
    """How many steps the decay of wsd takes; it ends at `decay_steps`. Also for constant and inverse_sqrt; null: none,
    which wsd refuses."""

    cooldown_percent: float | None = key(
        None, above=0, at_most=100, needs="scheduler.name=wsd|constant|inverse_sqrt", resume="schedule"
    )
    """Length of the cool-down as a percentage (0 to 100) of `total_steps`; wins over `cooldown_steps`."""

    cooldown_shape: Literal["linear", "1-sqrt", "cosine"] = key(
        "1-sqrt", needs="scheduler.name=wsd|constant|inverse_sqrt", resume="schedule"
    )
    """Form of the cool-down, if there is one: 1 - x, 1 - sqrt(x), or half a cosine."""

    total_steps: int | None = key(None, at_least=1, resume="schedule")
    """What the percentages refer to; null is the number of steps of the run."""

    final_lr_ratio: float = key(0.1, at_least=0, at_most=1, resume="schedule")
    """Learning rate after the decay, as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbSection:
    """Weights & Biases, an optional second record of the metrics."""

    enabled: bool = key(False, resume="free")
    """Send metrics to wandb, as `trainer.report_to: wandb` does; an error before any work when it is not installed."""

    project: str = key("neo-bert", resume="free")
    """Project name, of trackio too, and the name of the experiment in MLflow."""

    entity: str | None = key(None, resume="free")
    """User or team; null is the default of the account."""

    name: str | None = key(None, resume="free")
    """Run name, of other trackers too; null is `model.name`, and without one the name of `trainer.output_dir`."""

    tags: tuple[str, ...] = key((), resume="free")
    """Tags of the run."""

    mode: Literal["online", "offline", "disabled"] = key("online", resume="free")
    """offline writes to `dir` for a later `wandb sync`."""

    dir: str = key("logs/wandb", path=True, resume="free")
    """Folder of wandb's own files."""

    resume: Literal["never", "allow", "must", "auto"] = key("never", resume="free")
    """wandb's resume policy."""

    watch: Literal["off", "gradients", "parameters", "all"] = key("off", resume="free")
    """What wandb records as histograms; slows training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    task: Literal["pretraining", "contrastive", "finetune", "glue"] = key("pretraining", resume="fixed")
    """What to do with this file. `neobert pretrain` reads pretraining, `neobert finetune` the others: contrastive
    learns from pairs, finetune from labels. `neobert glue` reads glue."""

    seed: int = key(0, at_least=0, below=2**63, resume="order")
    """Seed of initial weights, data order, masks and dropout."""

    model: ModelSection = section(ModelSection)
    dataset: DatasetSection = section(DatasetSection)
    tokenizer: TokenizerSection = section(TokenizerSection)
    datacollator: DatacollatorSection = section(DatacollatorSection)
    optimizer: OptimizerSection = section(OptimizerSection)
    scheduler: SchedulerSection = section(SchedulerSection)
    trainer: TrainerSection = section(TrainerSection)
    wandb: WandbSection = section(WandbSection)
    distill: DistillSection = section(DistillSection, needs="trainer.objective=distill", tasks="pretraining")
    contrastive: ContrastiveSection = section(ContrastiveSection, tasks="contrastive")
    finetune: FinetuneSection = section(FinetuneSection, tasks="finetune glue")
    glue: GlueSection = section(GlueSection, tasks="glue")

    @property
    def requested_trackers(self) -> tuple[str, ...]:
        """What `trainer.report_to` names, or else `wandb.enabled`: `all` as such, empty for none."""
        if self.trainer.report_to is None:
            return ("wandb",) if self.wandb.enabled else ()
        return tuple(name for name in self.trainer.report_to if name != "none")

    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """No key: the dotted keys that were written down, in a file or on the command line."""
