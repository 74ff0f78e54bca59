"""What is tried for every task: learning rates, rows of a step and epochs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from neobert.config.schema_glue import GlueSection


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The points that are tried."""

    learning_rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    epochs: float


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class GridPoint:
    """One of them."""

    lr: float
    batch: int


GRIDS: dict[str, Grid] = {
    # Three of the four learning rates, one of the batch sizes and the epochs of the small BERTs (Turc et al., arXiv
    # 1908.08962, and the page of the models: 3e-4, 1e-4, 5e-5, 3e-5; 8 to 128 rows; 4 epochs).
    "small": Grid(learning_rates=(3e-5, 1e-4, 3e-4), batch_sizes=(32,), epochs=4),
    # RoBERTa's (Liu et al., arXiv 1907.11692, table 10), also that of NeoBERT's ablations (arXiv 2502.19587).
    "full": Grid(learning_rates=(1e-5, 2e-5, 3e-5), batch_sizes=(16, 32), epochs=10),
}
"""`glue.grid` -> the grid."""


def choose_points(section: GlueSection) -> list[GridPoint]:
    """The points of `glue.grid`, or of what replaces a part of it."""
    grid = GRIDS[section.grid]
    rates: Sequence[float] = section.learning_rates or grid.learning_rates
    sizes: Sequence[int] = section.batch_sizes or grid.batch_sizes
    return [GridPoint(lr=lr, batch=batch) for batch, lr in product(dict.fromkeys(sizes), dict.fromkeys(rates))]
