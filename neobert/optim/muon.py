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
(queries, keys and values; gate and up), each with an orthogonal factor of its own. Matrices of one shape go through the
products together. `reference_muon` computes the same one matrix at a time. Ranks of a run have the same gradients and
would all compute the same factors: with `share` each computes a part of them, and they are exchanged.

Nothing waits for a GPU. Where `found_inf` is set, weights, means and counts keep every bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from neobert.config.schema_optimizer import MuonSection
from neobert.optim.orthogonal import orthogonalize, reference_orthogonal

PARTS: dict[str, int] = {"qkv": 3, "gate_up": 2}
"""Matrices in a fused weight, by the name of its layer."""

_NORMUON_EPS = 1e-8
_MOST_ELEMENTS = 2**26
"""Of the matrices that go through the products together: bounds the memory of a step."""


Gather = Callable[[Tensor], Tensor]


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
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "fused": True})
        self.section, self.dtype = section, dtype
        self.equal_rows = equal_rows
        self._rank, self._world = 0, 1
        self._gather: Gather | None = None

    def share(self, rank: int, world: int, gather: Gather) -> None:
        """Has this rank compute one of `world` parts of the orthogonal factors, and `gather` bring those of the others:
        it takes `[n, rows, columns]` of every rank and returns `[world * n, rows, columns]`, in rank order.

        The weights are those of one process to the last bit where a product of one matrix does not depend on how many
        are in its batch.
        """
        self._rank, self._world, self._gather = rank, world, gather

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient; none where `found_inf` is set."""
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
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
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
        section, lr = self.section, group["lr"]
        names, params = [name for name, _ in named], [p for _, p in named]
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                if self.equal_rows:
                    self.state[p]["row_squares"] = p.new_zeros(p.shape[0], 1)
        skip = None if found_inf is None else found_inf != 0
        means = [self.state[p]["momentum"] for p in params]
        if skip is None:
            torch._foreach_lerp_(means, grads, 1 - section.muon_beta)
        else:
            for mean, new in zip(means, torch._foreach_lerp(means, grads, 1 - section.muon_beta)):
                torch.where(skip, mean, new, out=mean)
        directions = list(torch._foreach_lerp(grads, means, section.muon_beta)) if section.nesterov else means
        if group["weight_decay"]:
            kept = 1 - lr * group["weight_decay"]
            torch._foreach_mul_(params, kept if skip is None else torch.where(skip, 1.0, kept))
        squares = [self.state[p].get("row_squares") for p in params]
        for batch in _batches(names, params, directions, squares):
            updates = self._orthogonal(batch, skip)
            torch._foreach_add_(batch.weights, list(updates.unbind()), alpha=-lr)

    def _orthogonal(self, batch: "_Batch", skip: Tensor | None) -> Tensor:
        """What is subtracted from the weights of a batch, for a learning rate of 1; zeros where the step is skipped."""
        section = self.section
        stack = torch.stack(batch.directions)
        if skip is not None and section.nesterov:  # A gradient that is not finite is no part of the means.
            stack = torch.where(skip, 0.0, stack)
        updates = self._factors(stack)
        scale: Tensor | float = NORM_FACTORS[section.norm_factor](*stack.shape[1:])
        if self.equal_rows:
            means = torch.linalg.vector_norm(updates, dim=2, keepdim=True).square() / updates.shape[2]
            squares = torch.lerp(torch.stack(batch.squares), means, 1 - section.normuon_beta2)
            for old, new in zip(batch.squares, squares):
                old.copy_(new if skip is None else torch.where(skip, old, new))
            scale = scale * equal_row_scales(means, squares)
        return updates.mul_(scale if skip is None else torch.where(skip, 0.0, scale))

    def _factors(self, stack: Tensor) -> Tensor:
        """The orthogonal factor of each matrix of `stack` `[n, rows, columns]`, the work shared between the ranks."""
        method, num_steps = self.section.orthogonalization, self.section.ns_steps
        if self._gather is None:
            return orthogonalize(stack, method=method, num_steps=num_steps, dtype=self.dtype)
        own = -(-len(stack) // self._world)
        part = stack[self._rank * own : (self._rank + 1) * own]
        missing = part.new_zeros(own - len(part), *stack.shape[1:])
        part = orthogonalize(torch.cat((part, missing)), method=method, num_steps=num_steps, dtype=self.dtype)
        # In the type of the products nothing of them is lost, and bf16 is half as much to exchange.
        return self._gather(part.to(self.dtype))[: len(stack)].to(stack.dtype)


def equal_row_scales(means: Tensor, squares: Tensor) -> Tensor:
    """What the rows of matrices are multiplied with, `[n, rows, 1]`: 1 over the roots of `squares`, and what gives each
    matrix the size that it had.

    Args:
        means: of the squares of each row, `[n, rows, 1]`.
        squares: their running means.
    """
    even = 1 / (squares.sqrt() + _NORMUON_EPS)
    before, after = means.sum(1, keepdim=True), (means * even.square()).sum(1, keepdim=True)
    return even * (before / after.clamp_min(torch.finfo(after.dtype).tiny)).sqrt()


@dataclass(kw_only=True, slots=True)
class _Batch:
    """Matrices of one shape: views of the weights, of their directions and of the mean squares of their rows."""

    weights: list[Tensor]
    directions: list[Tensor]
    squares: list[Tensor]


def _batches(
    names: list[str], params: list[Tensor], directions: list[Tensor], squares: list[Tensor | None]
) -> Iterable[_Batch]:
    batches: dict[tuple[int, ...], _Batch] = {}
    for name, param, direction, square in zip(names, params, directions, squares):
        for number, weight in enumerate(split_matrices(name, param)):
            batch = batches.setdefault(tuple(weight.shape), _Batch(weights=[], directions=[], squares=[]))
            batch.weights.append(weight)
            batch.directions.append(split_matrices(name, direction)[number])
            if square is not None:
                batch.squares.append(split_matrices(name, square)[number])
    for (rows, columns), batch in batches.items():
        most = max(1, _MOST_ELEMENTS // (rows * columns))
        for first in range(0, len(batch.weights), most):
            part = slice(first, first + most)
            yield _Batch(weights=batch.weights[part], directions=batch.directions[part], squares=batch.squares[part])


def split_matrices(name: str, weight: Tensor) -> list[Tensor]:
    """The matrices in a weight with this dotted name, as views of it, from top to bottom."""
    parts = PARTS.get(name.split(".")[-2], 1) if "." in name else 1
    return list(weight.split(weight.shape[0] // parts))


def reference_muon(
    weight: Tensor,
    gradients: list[Tensor],
    *,
    section: MuonSection,
    equal_rows: bool,
    lr: float,
    weight_decay: float,
) -> Tensor:
    """One matrix after an update with each of `gradients`, by the formulas above, term by term; for tests."""
    mean, squares = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
    rows, columns = weight.shape
    beta, row_beta = section.muon_beta, section.normuon_beta2
    for gradient in gradients:
        mean = beta * mean + (1 - beta) * gradient
        direction = beta * mean + (1 - beta) * gradient if section.nesterov else mean
        update = reference_orthogonal(direction, section.orthogonalization, section.ns_steps)
        if equal_rows:
            squares = row_beta * squares + (1 - row_beta) * (update * update).sum(1) / columns
            even = update / (squares.sqrt() + _NORMUON_EPS)[:, None]
            update = even * update.norm() / even.norm()
        scale = NORM_FACTORS[section.norm_factor](rows, columns)
        weight = (1 - lr * weight_decay) * weight - lr * scale * update
    return weight


NORM_FACTORS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: (rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "none": lambda rows, columns: 1.0,
    "legacy_compat": lambda rows, columns: 0.4 * max(rows, columns) ** 0.5,
}
"""Rows (outputs) and columns (inputs) of a matrix -> what its orthogonal factor is multiplied with."""
