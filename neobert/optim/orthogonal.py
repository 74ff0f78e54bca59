"""Orthogonal factors of matrices by matrix products alone.

For G = U S V^T the factor is U V^T: the same directions, all singular values 1. An odd polynomial a x + b x^3 + c x^5
of the singular values is X <- a X + (b A + c A A) X with A = X X^T, or the same with A = X^T X from the right where
that is smaller. Scaled so that all singular values are at most 1, and with coefficients that lift small values and hold
those near 1, a few of them bring all values close to 1:

- `newton_schulz`: the same coefficients in each step, chosen for steepness at 0; values end between 0.7 and 1.2
  (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024).
- `polar_express`: for each step the polynomial with the smallest largest error over the interval that the steps before
  it leave (Amsel, Persson, Musco & Gower, arXiv 2505.16932, algorithm 1 and its listing), from singular values of 0.001
  on. All but the last are shrunk by 1.01 a power, so that a value that rounding has pushed above 1 comes back.

Matrices of one shape are one batched product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

_SAFETY = 1.01

_POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Of the listing in arXiv 2505.16932; the last one is the fixed point of the series and is repeated."""


def polar_express(num_steps: int) -> list[Coefficients]:
    """Coefficients of each of `num_steps` polynomials."""
    damped = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    table = [*damped, _POLAR_EXPRESS[-1]]
    return [table[min(step, len(table) - 1)] for step in range(num_steps)]


def newton_schulz(num_steps: int) -> list[Coefficients]:
    """Coefficients of each of `num_steps` polynomials."""
    return [(3.4445, -4.7750, 2.0315)] * num_steps


def orthogonalize(stack: Tensor, *, method: str, num_steps: int, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of each matrix of `stack` `[n, rows, columns]`, about as `num_steps` come close to it.

    A matrix of zeros stays one. Products are computed in `dtype`, the result has the dtype of `stack`.
    """
    # The Frobenius norm bounds the largest singular value; the margin is for the rounding of the products.
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True)
    x = (stack / (norm * _SAFETY).clamp_min(torch.finfo(norm.dtype).tiny)).to(dtype)
    tall, side = x.shape[1] > x.shape[2], min(x.shape[1:])
    gram, polynomial = x.new_empty(2, len(x), side, side)
    following = torch.empty_like(x)
    for a, b, c in ORTHOGONALIZATIONS[method](num_steps):
        torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, *((x, polynomial) if tall else (polynomial, x)), beta=a, out=following)
        x, following = following, x
    return x.to(stack.dtype)


def reference_orthogonal(matrix: Tensor, method: str, num_steps: int) -> Tensor:
    """The same of one matrix, by the polynomials of its singular values; for tests."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    x = values / (_SAFETY * values.square().sum().sqrt())
    for a, b, c in ORTHOGONALIZATIONS[method](num_steps):
        x = a * x + b * x**3 + c * x**5
    return u @ torch.diag(x) @ v


ORTHOGONALIZATIONS: dict[str, Callable[[int], list[Coefficients]]] = {
    "polar_express": polar_express,
    "newton_schulz": newton_schulz,
}
"""Number of steps -> coefficients of each."""
