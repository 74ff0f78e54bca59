"""Muon: the update of a matrix is the orthogonal factor of its running mean gradient.

    m <- beta m + (1 - beta) g
    o  = orthogonal factor of m          (nesterov: of beta m + (1 - beta) g)
    w <- (1 - lr * decay) w - lr * s * o

with s of `norm_factor` (K. Jordan et al., "Muon", 2024; decay and the factor that matches AdamW: arXiv 2502.16982).
NorMuon (arXiv 2510.05491, algorithm 1) gives each row of o, which is one neuron, the same size on average, and keeps
the size of the whole:

    v <- beta2 v + (1 - beta2) mean of o^2 over columns
    o <- o / (sqrt(v) + eps), scaled back to the Frobenius norm that o had

Only the matrices of the blocks are updated so; all other weights, embeddings and vocabulary projection among them, by
AdamW in the same object, so that there is one state dict. A fused weight is several matrices one below the other
(queries, keys and values; gate and up), each with an orthogonal factor of its own. With `split_heads` the queries and
the keys of each head are matrices too (as in GLM-5's Muon Split, which splits values besides). Matrices of one shape go
through the products together. `reference_muon` computes the same one matrix at a time. beta may change with the step
(`choose_muon_beta`), and the decay may be cautious (`cautious`).

Several ranks share the work: each matrix has one owner, which computes its factor (`owners.py`). Weights that every
rank has (DDP, `share`) keep their momentum on every rank; of weights that are sharded by rows (DTensors of FSDP2) the
momentum and the mean squares of rows are sharded like them, and only rows of directions and of factors are exchanged.
The update is the one of a single process, to the last bit where a product of one matrix does not depend on how many
are in its batch and no sum goes over ranks (NorMuon's size of a sharded matrix).

Nothing waits for a GPU. Where `found_inf` is set, weights, means and counts keep every bit.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from neobert.config.schema_optimizer import MuonSection
from neobert.optim.cautious import DECAY, decay_agreeing_
from neobert.optim.orthogonal import orthogonalize, reference_orthogonal
from neobert.optim.owners import ALONE, Owners, Ranks, find_ranks, like_rows, list_matrices
from neobert.optim.sharded_weights import local

PARTS: dict[str, int] = {"qkv": 3, "gate_up": 2}
"""Matrices of equal size in a fused weight, by the name of its layer."""

_NORMUON_EPS = 1e-8
_MOST_ELEMENTS = 2**26
"""Of the matrices that go through the products together: bounds the memory of a step."""


def is_free_to_read(tensor: Tensor) -> bool:
    """Whether its value is at hand without waiting for a device."""
    return tensor.device.type == "cpu"


class Muon(Optimizer):
    """Muon for the group of the role `matrices`, AdamW for the others; the formulas are at the head of this module."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        section: MuonSection,
        *,
        dtype: torch.dtype,
        equal_rows: bool,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """`dtype` is the type of the products, `equal_rows` makes it NorMuon; `betas` and `eps` are AdamW's."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "fused": True, "muon_beta": section.muon_beta})
        self.section, self.dtype = section, dtype
        self.equal_rows = equal_rows
        self._num_heads = 1
        self._copies = ALONE
        self._owners: dict[tuple[str, ...], Owners] = {}

    def share(self, group: Any) -> None:
        """Has the ranks of a process group, which have the same weights and gradients, share the work on matrices.

        Weights that are DTensors name their ranks themselves, and need no call.
        """
        self._copies = Ranks.of_group(group)
        self._owners.clear()

    def split_heads(self, num_heads: int) -> None:
        """Has the queries and the keys of each of so many heads be matrices of their own."""
        self._num_heads = num_heads
        self._owners.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient; none where `found_inf` is set. Collective where ranks share
        the work. There is no closure: the argument is what `torch.distributed.checkpoint` calls it with."""
        # Written by `step_unless` and by gradient scalers; a plain call has none.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and is_free_to_read(found_inf):
            if found_inf:
                return
            found_inf = None  # Without it means change in place.
        for group in self.param_groups:
            named = [(name, p) for name, p in zip(group["names"], group["params"]) if p.grad is not None]
            if not named:
                continue
            if group["roles"] == ["matrices"]:
                self._step_matrices(group, named, found_inf)
            else:
                self._step_adamw(group, [p for _, p in named], found_inf)

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor], found_inf: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params if p.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, group: dict[str, Any], named: list[tuple[str, Tensor]], found_inf: Tensor | None) -> None:
        section, lr, beta = self.section, group["lr"], group["muon_beta"]
        params = [p for _, p in named]
        grads = [local(p.grad) for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                if self.equal_rows:
                    self.state[p]["row_squares"] = like_rows(p)
        skip = None if found_inf is None else found_inf != 0
        own, means = [local(p) for p in params], [local(self.state[p]["momentum"]) for p in params]
        if skip is None:
            torch._foreach_lerp_(means, grads, 1 - beta)
        else:
            for mean, new in zip(means, torch._foreach_lerp(means, grads, 1 - beta)):
                torch.where(skip, mean, new, out=mean)
        directions = list(torch._foreach_lerp(grads, means, beta)) if section.nesterov else means
        if group["weight_decay"]:
            kept = 1 - lr * group["weight_decay"]
            torch._foreach_mul_(own, kept if skip is None else torch.where(skip, 1.0, kept))
        owners = self.find_owners(named)
        weights, parts = owners.split(own), owners.split(directions)
        squares = owners.split([local(self.state[p]["row_squares"]) for p in params]) if self.equal_rows else []
        factors = None if owners.world == 1 else self._exchange_factors(owners, parts, skip)
        for batch in _batches(owners.kinds):
            if factors is None:
                stack = self._factors([parts[n] for n in batch], skip)
            else:
                stack = torch.stack([factors[n] for n in batch]).to(parts[0].dtype)
            shape = owners.matrices[batch[0]].rows, owners.matrices[batch[0]].columns
            updates = self._scale(stack, shape, [squares[n] for n in batch if squares], skip, owners)
            if decay := group.get(DECAY):
                for n, update in zip(batch, updates):
                    decay_agreeing_(weights[n], update * weights[n], lr * decay, found_inf)
            torch._foreach_add_([weights[n] for n in batch], list(updates.unbind()), alpha=-lr)

    def find_owners(self, named: Sequence[tuple[str, Tensor]]) -> Owners:
        """Who computes the factors of these weights.

        Raises:
            ValueError: weights are laid out in several ways, or in one that Muon cannot take.
        """
        names = tuple(name for name, _ in named)
        if names not in self._owners:
            weights = [p for _, p in named]
            if len({(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in weights}) > 1:
                raise ValueError("the matrices of one parameter group are on different ranks; shard all of them alike")
            replicas, shards = find_ranks(weights[0]) if isinstance(weights[0], DTensor) else (self._copies, ALONE)
            heights = [split_rows(name, p.shape[0], self._num_heads) for name, p in named]
            matrices = list_matrices([p.shape for _, p in named], heights)
            self._owners[names] = Owners(matrices, replicas, shards)
        return self._owners[names]

    def _exchange_factors(self, owners: Owners, parts: list[Tensor], skip: Tensor | None) -> list[Tensor]:
        """This rank's rows of the factor of every matrix, in the type of the products: in it nothing of them is lost,
        and bf16 is half as much to exchange."""
        wholes = owners.collect(parts)
        for batch in _batches([tuple(whole.shape) for whole in wholes]):
            for n, factor in zip(batch, self._factors([wholes[n] for n in batch], skip)):
                wholes[n] = factor.to(self.dtype)
        return owners.distribute(wholes, parts[0].new_empty(0, dtype=self.dtype))

    def _factors(self, directions: list[Tensor], skip: Tensor | None) -> Tensor:
        """The orthogonal factor of each direction, `[n, rows, columns]`."""
        section, stack = self.section, torch.stack(directions)
        if skip is not None and section.nesterov:  # A gradient that is not finite is no part of the means.
            stack = torch.where(skip, 0.0, stack)
        return orthogonalize(stack, method=section.orthogonalization, num_steps=section.ns_steps, dtype=self.dtype)

    def _scale(
        self, factors: Tensor, shape: tuple[int, int], squares: list[Tensor], skip: Tensor | None, owners: Owners
    ) -> Tensor:
        """What is subtracted from the weights of a batch, for a learning rate of 1; zeros where the step is skipped.

        Args:
            factors: this rank's rows of factors of `shape`; overwritten.
        """
        section = self.section
        scale: Tensor | float = NORM_FACTORS[section.norm_factor](*shape)
        if self.equal_rows:
            means = torch.linalg.vector_norm(factors, dim=2, keepdim=True).square() / factors.shape[2]
            new_squares = torch.lerp(torch.stack(squares), means, 1 - section.normuon_beta2)
            for old, new in zip(squares, new_squares):
                old.copy_(new if skip is None else torch.where(skip, old, new))
            scale = scale * equal_row_scales(means, new_squares, owners.total)
        return factors.mul_(scale if skip is None else torch.where(skip, 0.0, scale))


def equal_row_scales(means: Tensor, squares: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """What the rows of matrices are multiplied with, `[n, rows, 1]`: 1 over the roots of `squares`, and what gives each
    matrix the size that it had.

    Args:
        means: of the squares of each row, `[n, rows, 1]`.
        squares: their running means.
        total: makes sums over these rows sums over all rows of their matrices.
    """
    even = 1 / (squares.sqrt() + _NORMUON_EPS)
    before, after = total(torch.stack((means.sum(1, keepdim=True), (means * even.square()).sum(1, keepdim=True))))
    return even * (before / after.clamp_min(torch.finfo(after.dtype).tiny)).sqrt()


def _batches(kinds: Sequence[tuple[int, ...]]) -> Iterable[list[int]]:
    """Numbers of matrices of one kind, which begins with rows and columns; not too many at once."""
    batches: dict[tuple[int, ...], list[int]] = {}
    for number, kind in enumerate(kinds):
        batches.setdefault(kind, []).append(number)
    for (rows, columns, *_), numbers in batches.items():
        most = max(1, _MOST_ELEMENTS // (rows * columns))
        yield from (numbers[first : first + most] for first in range(0, len(numbers), most))


def split_rows(name: str, rows: int, num_heads: int = 1) -> list[int]:
    """Rows of each matrix in a weight with this dotted name, one below the other; the queries and keys of each of
    `num_heads` heads apart.

    >>> split_rows("layers.0.qkv.weight", 12), split_rows("layers.0.qkv.weight", 12, num_heads=2)
    ([4, 4, 4], [2, 2, 2, 2, 4])
    """
    layer = name.split(".")[-2] if "." in name else ""
    parts = PARTS.get(layer, 1)
    if layer != "qkv":
        return [rows // parts] * parts
    return [rows // parts // num_heads] * (2 * num_heads) + [rows // parts]


def reference_muon(
    weight: Tensor,
    gradients: list[Tensor],
    *,
    section: MuonSection,
    equal_rows: bool,
    lr: float,
    weight_decay: float,
    betas: Sequence[float] | None = None,
    cautious: bool = False,
) -> Tensor:
    """One matrix after an update with each of `gradients`, by the formulas above, term by term; for tests. `betas`: of
    each update; None: all that of the section."""
    mean, squares = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
    rows, columns = weight.shape
    row_beta = section.normuon_beta2
    for gradient, beta in zip(gradients, betas or [section.muon_beta] * len(gradients), strict=True):
        mean = beta * mean + (1 - beta) * gradient
        direction = beta * mean + (1 - beta) * gradient if section.nesterov else mean
        update = reference_orthogonal(direction, section.orthogonalization, section.ns_steps)
        if equal_rows:
            squares = row_beta * squares + (1 - row_beta) * (update * update).sum(1) / columns
            even = update / (squares.sqrt() + _NORMUON_EPS)[:, None]
            update = even * update.norm() / even.norm()
        scale = NORM_FACTORS[section.norm_factor](rows, columns)
        decaying = (update * weight >= 0).to(weight.dtype) if cautious else 1.0
        weight = weight - lr * weight_decay * decaying * weight - lr * scale * update
    return weight


NORM_FACTORS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: (rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "none": lambda rows, columns: 1.0,
    "legacy_compat": lambda rows, columns: 0.4 * max(rows, columns) ** 0.5,
}
"""Rows (outputs) and columns (inputs) of a matrix -> what its orthogonal factor is multiplied with."""
