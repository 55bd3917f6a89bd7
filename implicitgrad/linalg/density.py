"""The density of eigenvalues of a symmetric operator."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, require_symmetric
from implicitgrad.linalg.lanczos import lanczos, ritz
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.sampling import generator_on, sign_blocks

# The smoothing reaches this many widths beyond the outermost nodes: all but 6e-7 of its mass.
TAIL = 5.0
GRID_SIZE = 1000


class SpectralDensity(NamedTuple):
    """How the n eigenvalues of a matrix are spread, as a density of mass one.

    Attributes:
        nodes: ``(num_probes, m)``, Ritz values.
        weights: ``(num_probes, m)``, of sum one in each row; ``(weights * f(nodes)).sum(-1).mean()`` estimates
            ``tr f(A) / n`` for any function f.
        grid: ``(g,)``, points in ascending order.
        density: ``(g,)``, the nodes smoothed by a Gaussian; its integral is one.
        standard_error: of the density, judged by the spread of the probes, ``(g,)``.
        width: standard deviation of the Gaussian, in units of A.
        num_matvec: products spent.
    """

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor
    standard_error: Tensor
    width: float
    num_matvec: int


def spectral_density(
    A: LinearOperator,
    num_steps: int = 50,
    num_probes: int = 10,
    grid: Tensor | None = None,
    width: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    r"""The density of eigenvalues by stochastic Lanczos quadrature.

    For a probe z of random signs, Lanczos gives the Gauss quadrature of the measure that has the mass
    $(v_i^\top z)^2 / n$ at each eigenvalue $\lambda_i$ with eigenvector $v_i$: the nodes are Ritz values, the weights
    squares of first entries, and polynomials up to degree 2 m - 1 are integrated exactly. The mean over probes is the
    density, smoothed by a Gaussian. Costs ``num_steps · num_probes`` products, and `num_steps` vectors of memory.

    Source: Ubaru, Chen and Saad (2017), algorithm 1; Ghorbani, Krishnan and Xiao (2019) for Hessians of networks.

    Args:
        A: symmetric, one system.
        num_steps: m, steps of Lanczos per probe.
        num_probes: at least 2.
        grid: where the density is evaluated, ``(g,)``; by default 1000 points that hold all of its mass.
        width: standard deviation of the Gaussian; by default a hundredth of the range of the nodes.
        generator: draws the probes; by default a fresh one with a fixed seed.

    Raises:
        ValueError: A is not declared symmetric or a stack; too few probes; a width that is not positive.
        FloatingPointError: NaN or infinity in a product.

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0])), symmetric=True)
        >>> found = spectral_density(A, grid=torch.tensor([0.5]))
        >>> found.density, (found.weights * found.nodes).sum(-1).mean()  # the latter is tr A / 4
        (tensor([0.]), tensor(0.7500))
    """
    require_symmetric("spectral_density", A, "the operator A.T @ A, whose eigenvalues are squared singular values")
    if A.batch_shape:
        raise ValueError(f"spectral_density needs one system; got {A}. Take the systems of the stack one by one.")
    check_count("spectral_density", "num_probes", num_probes, at_least=2)
    if width is not None and not width > 0:
        raise ValueError(f"spectral_density(width=...) needs a positive number, or None for a hundredth; got {width}.")
    generator = generator_on(A.device, generator)
    found, num_matvec = [], 0
    for signs in sign_blocks(A, num_probes, generator):
        for probe in signs:
            process = lanczos(A, num_steps, start=probe, generator=generator)
            found.append(ritz(process))
            num_matvec += process.num_matvec
    nodes = torch.stack([each.values for each in found])
    weights = torch.stack([each.coefficients[0].square() for each in found])
    width = _default_width(nodes) if width is None else width
    low, high = nodes.min().item() - TAIL * width, nodes.max().item() + TAIL * width
    points = torch.linspace(low, high, GRID_SIZE, dtype=nodes.dtype) if grid is None else grid.detach().cpu().double()
    per_probe = torch.stack([_smoothed(*probe, points, width) for probe in zip(nodes, weights, strict=True)])
    density, error = per_probe.mean(0), per_probe.std(0) / num_probes**0.5
    like = torch.empty(0, dtype=factor_dtype(A.dtype), device=A.device)
    nodes, weights, points, density, error = (each.to(like) for each in (nodes, weights, points, density, error))
    return SpectralDensity(nodes, weights, points, density, error, width, num_matvec)


def _smoothed(nodes: Tensor, weights: Tensor, points: Tensor, width: float) -> Tensor:
    """``Σⱼ weightsⱼ N(points; nodesⱼ, width²)``, ``(g,)``."""
    steps = (points.unsqueeze(-1) - nodes) / width
    return (-0.5 * steps.square()).exp() @ weights / (width * math.sqrt(2 * math.pi))


def _default_width(nodes: Tensor) -> float:
    """A hundredth of the range; of the size for a multiple of the identity, whose range is rounding; 1 for zero."""
    span, size = (nodes.max() - nodes.min()).item(), nodes.abs().max().item()
    return 0.01 * (span if span > 1e-6 * size else size) or 1.0
