"""Everything a run on labels reads: its examples as tokens, their order, and the loader over them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from neobert.config.schema import Config
from neobert.data.pipeline import Reader, build_loader
from neobert.data.rows.batch_size import BatchSchedule, constant_batch
from neobert.data.rows.lanes import RowOrder, State, sum_counters
from neobert.data.rows.loader import Loader, LoaderSettings
from neobert.data.rows.side_by_side import SideBySide
from neobert.data.source.inventory import NO_FILES, Inventory
from neobert.data.tokenizer import Tokenizer
from neobert.finetune.example_order import WINDOW_ROWS, ExampleCollator, ExampleLane, TokenExamples
from neobert.finetune.labelled_data import LabelledExample, fingerprint, read_splits
from neobert.finetune.labels import number_labels
from neobert.objectives.classification import Kind
from neobert.objectives.labelled_rows import encode_rows, encode_words


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinetuneData:
    """What one process of a run reads; all of it is in memory."""

    tokenizer: Tokenizer
    train: TokenExamples
    evaluation: TokenExamples
    """Without examples where nothing is evaluated."""

    order: RowOrder
    loader_settings: LoaderSettings
    collate: ExampleCollator
    fingerprint: str
    eval_fingerprint: str | None
    notes: tuple[str, ...]

    @property
    def inventory(self) -> Inventory:
        """A note has the splits; single files matter to corpora."""
        return NO_FILES

    @property
    def labels(self) -> tuple[str, ...]:
        """One source."""
        return ("rows",)

    @property
    def num_rows(self) -> int:
        return len(self.train)

    @property
    def num_tokens(self) -> None:
        """Steps count rows."""
        return None

    @property
    def batch(self) -> BatchSchedule:
        """The rows of every step."""
        return self.loader_settings.batch

    def loader(self, state: State | None = None, skip: Sequence[tuple[int, int]] = (), step: int = 0) -> Loader:
        """The training batches of this rank from step `step` on, after `state` or from the start."""
        return build_loader(self, lambda _: ExampleLane(self.train, self.order.seed), state, skip, step)

    def counters(self, state: State) -> dict[str, int]:
        return sum_counters(state)


def build_finetune_data(config: Config, tokenizer: Tokenizer, reader: Reader) -> FinetuneData:
    """What one process of a run with this bound config reads; arguments as of `neobert.train.build.build_config_data`.

    Raises:
        DataError: the source cannot be used as configured.
    """
    section, length = config.finetune, config.dataset.max_seq_length
    assert section.kind != "auto", "the config is bound"
    splits = read_splits(config)
    train, train_notes = _encode(config, section.kind, tokenizer, splits.train, "training")
    evaluation, eval_notes = _encode(config, section.kind, tokenizer, splits.evaluation, "evaluation")
    return FinetuneData(
        tokenizer=tokenizer,
        train=train,
        evaluation=evaluation,
        order=RowOrder.of_examples(seed=config.seed, window_documents=WINDOW_ROWS, max_seq_length=length),
        loader_settings=reader.loader_settings(
            config.dataset, batch=constant_batch(reader.rows_per_step), micro_batch_rows=config.trainer.micro_batch_rows
        ),
        collate=ExampleCollator(examples=train, texts=SideBySide(max_seq_length=length, pad_id=tokenizer.pad_id)),
        fingerprint=fingerprint(splits.train),
        eval_fingerprint=fingerprint(splits.evaluation) if splits.evaluation else None,
        notes=(*splits.notes, *train_notes, *eval_notes),
    )


def _encode(
    config: Config, kind: Kind, tokenizer: Tokenizer, examples: Sequence[LabelledExample], name: str
) -> tuple[TokenExamples, list[str]]:
    encode = encode_words if kind == "tokens" else encode_rows
    length = config.dataset.max_seq_length
    rows = [example.texts for example in examples]
    encoded = encode(tokenizer, rows, length)
    targets = number_labels(kind, config.finetune.labels, [example.label for example in examples])
    found = TokenExamples(kind=kind, tokens=encoded.tokens, firsts=encoded.firsts, targets=targets)
    return found, list(_describe_rows(rows, encoded.num_cut, encoded.longest, length, name))


def _describe_rows(rows: Sequence[Sequence[str]], num_cut: int, longest: int, length: int, name: str) -> Iterable[str]:
    if num_cut:
        yield (
            f"{num_cut:,} of {len(rows):,} {name} texts are longer than dataset.max_seq_length = {length} tokens and "
            f"are cut; the longest has {longest:,}"
        )
    if num_empty := sum(not any(text.strip() for text in row) for row in rows):
        yield f"{num_empty:,} of {len(rows):,} {name} texts are empty"


def describe_labels(config: Config) -> str:
    """What is learned, for the console."""
    section = config.finetune
    if section.kind == "regression":
        return "regression: one number a text"
    names = ", ".join(section.labels[:12]) + (", ..." if len(section.labels) > 12 else "")
    return f"{section.kind}: {len(section.labels)} labels ({names})"
