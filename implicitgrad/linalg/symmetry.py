"""How far a product is from symmetric, and how far rounding alone can take it."""

import torch
from torch import Tensor

from implicitgrad.linalg.matrix import Product


def asymmetry(product: Product, example: Tensor, generator: torch.Generator | None) -> float:
    """``|<u, Av> - <v, Au>| / (|u| |Av| + |v| |Au|)`` for one pair u, v; the largest over a stack of systems.

    Args:
        product: v -> A v on ``(*batch, n)``.
        example: a vector ``(*batch, n)``; read for its shape, dtype and device.
        generator: draws u and v; by default they are fixed irregular sequences, since drawing is forbidden inside some
            transforms.
    """
    u, v = (irregular(example), irregular(example, 3**0.5)) if generator is None else _random_pair(example, generator)
    Au, Av = product(u).detach(), product(v).detach()
    dot, norm = torch.linalg.vecdot, torch.linalg.vector_norm
    size = norm(u, dim=-1) * norm(Av, dim=-1) + norm(v, dim=-1) * norm(Au, dim=-1)
    gap = (dot(u, Av) - dot(v, Au)).abs()
    return torch.where(size == 0, gap, gap / size).amax().item()


def irregular(example: Tensor, pace: float = 1.0) -> Tensor:
    """A vector like `example` with rows of norm one that no matrix of practice is built to deceive: sin(pace · k²)."""
    squares = torch.arange(1, example.numel() + 1, dtype=torch.float64, device=example.device).square()
    rows = (pace * squares).sin().reshape(example.shape)
    return (rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)).to(example.dtype)


def _random_pair(example: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    pair = torch.randn(2, *example.shape, generator=generator, device=generator.device, dtype=example.dtype)
    return pair[0].to(example.device), pair[1].to(example.device)


def symmetry_tolerance(dtype: torch.dtype) -> float:
    """Largest asymmetry taken for rounding: eps^0.6, which is 4e-10 in float64 and 7e-5 in float32.

    It has no factor for n: rounding errors of the entries average out in <u, Av> at the rate 1/√n at which a true
    asymmetry does.
    """
    return torch.finfo(dtype).eps ** 0.6


def check_entries(matrix: Tensor) -> None:
    """Refuse a matrix ``(*batch, n, n)`` that was declared symmetric and is not.

    Raises:
        ValueError: the largest difference of mirrored entries is above `symmetry_tolerance` times the largest entry.
    """
    gap, size = (matrix - matrix.mT).abs().amax(), matrix.abs().amax()
    if gap > symmetry_tolerance(matrix.dtype) * size:
        raise ValueError(
            f"The matrix was declared symmetric; entries differ from the mirrored ones by {gap:.1e} where the largest"
            f" entry is {size:.1e}. Pass symmetric=False, or symmetrise it: (M + M.mT) / 2."
        )
