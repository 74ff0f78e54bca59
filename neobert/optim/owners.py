"""Which rank computes with which whole matrix, and how matrices come to their owners and results back.

Muon's orthogonal factor needs the whole matrix. Every matrix has one owner among all ranks, chosen so that the ranks
have about the same amount of work (`assign_owners`), and everything is exchanged in one call per stage:

| weights | to the owner | back |
|---|---|---|
| on every rank (DDP) | nothing: gradients are averaged, so momentum is there | one all-gather |
| rows on the ranks of a mesh (FSDP2) | one all-to-all of rows | one all-to-all of rows |
| both (HSDP) | an all-to-all in each replica, of the matrices that it owns | the same, then an all-gather of replicas |

Rows are shared as `Shard(0)` does it: the first ranks have ceil(rows / ranks) each, the last ones may have fewer or
none, and a border may cut a matrix of a fused weight. The same calls run over gloo and NCCL.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from neobert.optim.sharded_weights import local


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This rank among those it exchanges with."""

    group: Any = None
    """Process group; None for a rank alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_group(cls, group: Any) -> "Ranks":
        """The ranks of a process group."""
        return cls(group=group, rank=dist.get_rank(group), size=dist.get_world_size(group))


ALONE = Ranks()


def like_rows(weight: Tensor) -> Tensor:
    """Zeros `[rows, 1]`, sharded like the rows of `weight`."""
    zeros = local(weight).new_zeros(len(local(weight)), 1)
    if not isinstance(weight, DTensor):
        return zeros
    shape = torch.Size((weight.shape[0], 1))
    return DTensor.from_local(zeros, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(1, 1))


def find_ranks(weight: DTensor) -> tuple[Ranks, Ranks]:
    """The ranks that have copies of the rows that this rank has of `weight`, and those that have the other rows.

    Raises:
        ValueError: `weight` is sharded by anything but its rows.
    """
    found = {True: ALONE, False: ALONE}
    for dim, placement in enumerate(weight.placements):
        if weight.device_mesh.size(dim) == 1:
            continue
        is_shard = _is_by_rows(placement)
        if not (is_shard or placement.is_replicate()) or found[is_shard] is not ALONE:
            raise ValueError(
                f"a matrix is laid out as {weight.placements}: Muon takes rows on one dimension of a mesh (Shard(0), "
                "as fully_shard lays them out) and copies on another"
            )
        found[is_shard] = Ranks.of_group(weight.device_mesh.get_group(dim))
    return found[False], found[True]


def _is_by_rows(placement: Placement) -> bool:
    return type(placement) is Shard and placement.dim == 0


def row_range(rows: int, shard: int, num_shards: int) -> tuple[int, int]:
    """First row and the one after the last of a shard.

    >>> [row_range(5, shard, 4) for shard in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    size = -(-rows // num_shards)
    return min(rows, shard * size), min(rows, (shard + 1) * size)


def first_row(weight: Tensor) -> int:
    """Of this rank's part of `weight`."""
    if not isinstance(weight, DTensor):
        return 0
    _, shards = find_ranks(weight)
    return row_range(weight.shape[0], shards.rank, shards.size)[0]


def count_products(rows: int, columns: int) -> int:
    """Multiplications in a step of an orthogonalisation: two products with the matrix, one of its small square."""
    side, length = min(rows, columns), max(rows, columns)
    return side * side * (2 * length + side)


def assign_owners(costs: Sequence[int], world: int) -> list[int]:
    """An owner for each cost: the largest first, each to the rank that has the least so far (Graham, 1969). No rank has
    more than 4/3 of the best that is possible.

    >>> assign_owners([3, 3, 2, 2, 2], 2)
    [0, 1, 0, 1, 0]
    """
    loads = [(0, rank) for rank in range(world)]
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        load, owners[number] = loads[0]
        heapq.heapreplace(loads, (load + costs[number], owners[number]))
    return owners


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One matrix of a weight."""

    weight: int
    """Number of the weight."""

    first: int
    """Its first row in the weight."""

    rows: int
    columns: int
    weight_rows: int


def list_matrices(shapes: Sequence[Sequence[int]], heights: Sequence[Sequence[int]]) -> list[Matrix]:
    """The matrices in weights of these shapes: of each the rows of its matrices, one below the other."""
    return [
        Matrix(weight=number, first=end - rows, rows=rows, columns=columns, weight_rows=weight_rows)
        for number, ((weight_rows, columns), own) in enumerate(zip(shapes, heights, strict=True))
        for rows, end in zip(own, accumulate(own))
    ]


class Owners:
    """The matrices of some weights and their owners. All ranks make it of equal arguments, but for their own ranks."""

    def __init__(self, matrices: Sequence[Matrix], replicas: Ranks = ALONE, shards: Ranks = ALONE) -> None:
        """`replicas` have copies of what this rank has of each weight, `shards` have the other rows."""
        self.matrices, self._replicas, self._shards = list(matrices), replicas, shards
        costs = [count_products(m.rows, m.columns) for m in matrices]
        owners = assign_owners(costs, replicas.size * shards.size)
        self._owned = [[n for n, owner in enumerate(owners) if owner == rank] for rank in range(self.world)]

    @property
    def world(self) -> int:
        """Ranks among which the work is shared."""
        return self._replicas.size * self._shards.size

    @property
    def mine(self) -> list[int]:
        """Numbers of the matrices that this rank owns."""
        return self._owned_by(self._replicas.rank, self._shards.rank)

    @property
    def kinds(self) -> list[tuple[int, ...]]:
        """What matrices have in common of which every rank has the same number of rows."""
        if self._shards.size == 1:
            return [(m.rows, m.columns) for m in self.matrices]
        return [(m.rows, m.columns, m.weight_rows, m.first) for m in self.matrices]

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's rows of every matrix, as views of its part of the weights, or of what is laid out like them."""
        found = []
        for m in self.matrices:
            first, last = self._rows(m, self._shards.rank)
            start = row_range(m.weight_rows, self._shards.rank, self._shards.size)[0]
            found.append(tensors[m.weight][first - start : last - start])
        return found

    def collect(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The whole matrices that this rank owns, in the order of `mine`. Collective.

        Args:
            parts: this rank's rows of every matrix.
        """
        if self._shards.size == 1:
            return [parts[n] for n in self.mine]
        replica, shards = self._replicas.rank, range(self._shards.size)
        received = self._send_to_shards(
            [[parts[n] for n in self._owned_by(replica, shard)] for shard in shards],
            [[self._shape(n, shard) for n in self.mine] for shard in shards],
            parts[0],
        )
        return [torch.cat(rows) for rows in zip(*received)]

    def distribute(self, wholes: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """This rank's rows of every matrix. Collective.

        Args:
            wholes: what this rank makes of the matrices that it owns, in the order of `mine`.
            like: a tensor of their type, for ranks that own none.
        """
        replica, owned = self._replicas.rank, list(wholes)
        if self._shards.size > 1:
            shards = range(self._shards.size)
            ranges = [[self._range(n, shard) for n in self.mine] for shard in shards]
            sent = [[whole[first:last] for whole, (first, last) in zip(wholes, rows)] for rows in ranges]
            shapes = [[self._shape(n, self._shards.rank) for n in self._owned_by(replica, shard)] for shard in shards]
            owned = [rows for of_rank in self._send_to_shards(sent, shapes, like) for rows in of_rank]
        numbers = [self._owned_by_replica(rank) for rank in range(self._replicas.size)]
        every = [owned] if self._replicas.size == 1 else self._gather_from_replicas(owned, numbers, like)
        found = {n: rows for ns, of_rank in zip(numbers, every) for n, rows in zip(ns, of_rank, strict=True)}
        return [found[n] for n in range(len(self.matrices))]

    def total(self, sums: Tensor) -> Tensor:
        """What sums over this rank's rows are over all rows. Collective."""
        if self._shards.size > 1:
            dist.all_reduce(sums, group=self._shards.group)
        return sums

    def _send_to_shards(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]], like: Tensor
    ) -> list[list[Tensor]]:
        """Tensors for each shard to tensors of `shapes` from each."""
        flat = [rows.reshape(-1) for of_rank in sent for rows in of_rank]
        data = torch.cat(flat) if flat else like.new_empty(0)
        sizes = [sum(rows * columns for rows, columns in of_rank) for of_rank in shapes]
        received = like.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, data, sizes, [sum(x.numel() for x in of_rank) for of_rank in sent], group=self._shards.group
        )
        return [_unpack(part, of_rank) for part, of_rank in zip(received.split(sizes), shapes)]

    def _gather_from_replicas(self, owned: list[Tensor], numbers: list[list[int]], like: Tensor) -> list[list[Tensor]]:
        """What each replica has of the matrices that it owns."""
        shapes = [[self._shape(n, self._shards.rank) for n in ns] for ns in numbers]
        size = max(sum(rows * columns for rows, columns in of_rank) for of_rank in shapes)
        data = like.new_zeros(size)
        if owned:
            flat = torch.cat([rows.reshape(-1) for rows in owned])
            data[: len(flat)] = flat
        gathered = list(like.new_empty(self._replicas.size, size).unbind())
        dist.all_gather(gathered, data, group=self._replicas.group)
        return [_unpack(part, of_rank) for part, of_rank in zip(gathered, shapes)]

    def _owned_by(self, replica: int, shard: int) -> list[int]:
        return self._owned[replica * self._shards.size + shard]

    def _owned_by_replica(self, replica: int) -> list[int]:
        return [n for shard in range(self._shards.size) for n in self._owned_by(replica, shard)]

    def _rows(self, matrix: Matrix, shard: int) -> tuple[int, int]:
        """First row of a shard in the weight that belongs to the matrix, and the one after the last."""
        first, last = row_range(matrix.weight_rows, shard, self._shards.size)
        first, last = max(first, matrix.first), min(last, matrix.first + matrix.rows)
        return (first, last) if first < last else (row_range(matrix.weight_rows, shard, self._shards.size)[0],) * 2

    def _range(self, number: int, shard: int) -> tuple[int, int]:
        """The same, in the matrix."""
        matrix = self.matrices[number]
        first, last = self._rows(matrix, shard)
        return (first - matrix.first, last - matrix.first) if first < last else (0, 0)

    def _shape(self, number: int, shard: int) -> tuple[int, int]:
        first, last = self._range(number, shard)
        return last - first, self.matrices[number].columns


def _unpack(data: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    sizes = [rows * columns for rows, columns in shapes]
    used = data[: sum(sizes)]
    return [part.view(shape) for part, shape in zip(used.split(sizes), shapes)]
