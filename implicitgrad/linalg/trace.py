"""Trace and diagonal of an operator from random products."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count
from implicitgrad.linalg.matrix import as_columns, as_rows, factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.sampling import Estimate, RunningMean, generator_on, rows_at_once, sign_blocks
from implicitgrad.linalg.solver import Products, check_finite


def trace(
    A: LinearOperator,
    num_matvec: int = 60,
    method: Literal["hutch++", "hutchinson"] = "hutch++",
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""The trace of a square operator, without bias.

    Hutchinson: the mean of ``zᵀAz`` over random signs z; its variance is at most $2 |A|_F^2 / m$. Hutch++ spends a
    third of the products on a basis Q of the range of ``A S`` with random signs S, a third on the exact trace
    ``tr QᵀAQ``, and a third on Hutchinson for what is left, ``(I - QQᵀ) A (I - QQᵀ)``: for a positive semidefinite A
    the error falls like 1/m instead of 1/√m, and it is zero once m / 3 reaches the rank. It needs 2 m / 3 vectors of
    memory and ``O(n m²)`` operations; Hutchinson needs two vectors. Where `num_matvec` reaches n the trace is exact.

    Source: Hutchinson (1990); Meyer, Musco, Musco and Woodruff, Hutch++ (2021), algorithm 1.

    Args:
        A: square, a stack too; need not be symmetric.
        num_matvec: m, products to spend at most; at least 6 for Hutch++, 2 for Hutchinson.
        method: "hutchinson" where memory is short.
        generator: draws the signs; by default a fresh one with a fixed seed.

    Returns:
        The trace, ``(*batch_shape,)``, and its standard error, judged by the spread of the m / 3 or m samples; float32
        or better.

    Raises:
        ValueError: A is rectangular, too few products, or an unknown method.
        FloatingPointError: NaN or infinity in a product.

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([3.0, 2.0, 1.0])), symmetric=True)
        >>> trace(A).value
        tensor(6.)
    """
    _check_square("trace", A)
    if method not in ("hutch++", "hutchinson"):
        raise ValueError(f'trace(method=...) needs "hutch++" or "hutchinson"; got {method!r}.')
    check_count("trace", "num_matvec", num_matvec, at_least=6 if method == "hutch++" else 2)
    product, generator = Products(A), generator_on(A.device, generator)
    if num_matvec >= A.size:
        exact = _exact_diagonal(A, product).sum(-1)
        check_finite("trace", product.count, exact)
        return Estimate(exact, torch.zeros_like(exact), product.count)
    count = num_matvec // 3 if method == "hutch++" else num_matvec
    if method == "hutch++":
        basis, known = _dominant_part(A, product, count, generator)
    else:
        basis, known = None, 0.0
    samples = []
    for signs in sign_blocks(A, count, generator):
        z = signs.to(factor_dtype(A.dtype))
        if basis is not None:
            z = z - as_rows(basis @ (basis.mT @ as_columns(z)))
        samples.append(torch.linalg.vecdot(z, product(z.to(A.dtype)).to(z.dtype)))
    return _mean_of("trace", torch.cat(samples), known, product.count)


def per_block_trace(
    A: LinearOperator, blocks: Mapping[str, slice], num_probes: int = 30, generator: torch.Generator | None = None
) -> dict[str, Estimate]:
    r"""The trace of diagonal blocks, say of the Hessian with respect to each layer; one product serves all of them.

    The mean of $z_B^\top (A z)_B$ over random signs z of full length, for each block B. Its variance has
    $|A_{BC}|_F^2$ of the blocks C beside B in it, which `trace` of ``A.restricted(...)`` has not, at one set of
    products per block.

    Source: Hutchinson (1990); the use per layer: Dong et al., HAWQ-V2 (2020), where each layer has its own products.

    Args:
        A: square, a stack too.
        blocks: positions of each block in a vector, ``{"name": slice(start, stop)}``; may overlap.
        num_probes: products to spend, at least 2.
        generator: draws the signs; by default a fresh one with a fixed seed.

    Returns:
        For each name the trace, ``(*batch_shape,)``, its standard error, and the products of all blocks together.

    Raises:
        TypeError: `blocks` is no mapping.
        ValueError: A is rectangular, fewer than two probes, or a block that is no slice, empty or not inside of A.
        FloatingPointError: NaN or infinity in a product.

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([3.0, 2.0, 1.0])), symmetric=True)
        >>> {name: found.value for name, found in per_block_trace(A, {"w": slice(0, 2), "b": slice(2, 3)}).items()}
        {'w': tensor(5.), 'b': tensor(1.)}
    """
    _check_square("per_block_trace", A)
    check_count("per_block_trace", "num_probes", num_probes, at_least=2)
    check_blocks("per_block_trace", A, blocks)
    product, generator = Products(A), generator_on(A.device, generator)
    samples: dict[str, list[Tensor]] = {name: [] for name in blocks}
    for z in sign_blocks(A, num_probes, generator):
        entries = (z * product(z)).to(factor_dtype(A.dtype))
        for name, block in blocks.items():
            samples[name].append(entries[..., block].sum(-1))
    return {name: _mean_of("per_block_trace", torch.cat(s), 0.0, product.count) for name, s in samples.items()}


def diagonal(
    A: LinearOperator, num_probes: int = 30, generator: torch.Generator | None = None, *, exact: bool = False
) -> Estimate:
    r"""The diagonal of a square operator, without bias.

    The mean of $z \odot A z$ over random signs z; the variance of entry i is $\sum_{j \neq i} A_{ij}^2 / m$ for m
    probes. So a diagonal that stands out is found quickly, one that does not is found slowly: see `standard_error`.
    Costs m products and four vectors of memory.

    Source: Bekas, Kokiopoulou and Saad (2007); with signs their divisor is m.

    Args:
        A: square, a stack too; need not be symmetric.
        num_probes: m, at least 2. Not read with `exact`.
        generator: draws the signs; by default a fresh one with a fixed seed.
        exact: the diagonal itself from n products with unit vectors; none if A has its matrix.

    Returns:
        The diagonal ``(*batch_shape, n)`` and its standard error; float32 or better.

    Raises:
        ValueError: A is rectangular, or fewer than two probes.
        FloatingPointError: NaN or infinity in a product.

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([3.0, 2.0, 1.0])), symmetric=True)
        >>> diagonal(A).value, diagonal(A).standard_error
        (tensor([3., 2., 1.]), tensor([0., 0., 0.]))
    """
    _check_square("diagonal", A)
    check_count("diagonal", "num_probes", num_probes, at_least=2)
    product = Products(A)
    if exact:
        value = _exact_diagonal(A, product)
        error = torch.zeros_like(value)
    else:
        mean = RunningMean(torch.empty(A.vector_shape, dtype=A.dtype, device=A.device))
        for z in sign_blocks(A, num_probes, generator_on(A.device, generator)):
            mean.add(z * product(z))
        value, error = mean.mean, mean.standard_error
    check_finite("diagonal", product.count, value)
    return Estimate(value, error, product.count)


def check_blocks(name: str, A: LinearOperator, blocks: Mapping[str, slice]) -> None:
    """Refuse blocks that are not slices ``slice(start, stop)`` with ``0 <= start < stop <= n``.

    Raises:
        TypeError: no mapping.
        ValueError: naming the block.
    """
    if not isinstance(blocks, Mapping):
        raise TypeError(f'{name} needs blocks by name, {{"name": slice(start, stop)}}; got {type(blocks).__name__}.')
    for key, block in blocks.items():
        if not (isinstance(block, slice) and _is_proper(block, A.size)):
            raise ValueError(f"{name} needs blocks slice(start, stop) within 0 and {A.size}; {key!r} is {block}.")


def _is_proper(block: slice, size: int) -> bool:
    start, stop = block.start, block.stop
    return start is not None and stop is not None and block.step in (None, 1) and 0 <= start < stop <= size


def _dominant_part(
    A: LinearOperator, product: Products, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A basis Q ``(*batch, n, count)`` of the range of ``A S``, and ``tr QᵀAQ``."""
    dtype = factor_dtype(A.dtype)
    image = torch.cat([product(signs).to(dtype) for signs in sign_blocks(A, count, generator)])
    basis = torch.linalg.qr(as_columns(image)).Q
    rows = as_rows(basis).to(A.dtype).contiguous()
    parts = [torch.linalg.vecdot(part, product(part)) for part in rows.split(rows_at_once(A))]
    return basis, torch.cat(parts).to(dtype).sum(0)


def _mean_of(name: str, samples: Tensor, known: Tensor | float, num_matvec: int) -> Estimate:
    check_finite(name, num_matvec, samples)
    return Estimate(known + samples.mean(0), samples.std(0) / len(samples) ** 0.5, num_matvec)


def _exact_diagonal(A: LinearOperator, product: Products) -> Tensor:
    dtype = factor_dtype(A.dtype)
    if A.dense_cost == 0:  # the matrix is at hand
        return A.to_dense().detach().diagonal(dim1=-2, dim2=-1).to(dtype)
    parts = []
    for positions in torch.arange(A.size, device=A.device).split(rows_at_once(A)):
        index = positions.view(-1, *(1 for _ in A.vector_shape)).expand(-1, *A.batch_shape, 1)
        units = torch.zeros(len(positions), *A.vector_shape, dtype=A.dtype, device=A.device).scatter_(-1, index, 1)
        parts.append(product(units).gather(-1, index).squeeze(-1))
    return torch.cat(parts).movedim(0, -1).to(dtype)


def _check_square(name: str, A: LinearOperator) -> None:
    if not A.is_square:
        raise ValueError(f"{name} needs a square operator; got {A}. Take that of A.T @ A.")
