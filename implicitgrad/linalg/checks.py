"""What every solver demands of its hyperparameters and of the system, in one place."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import row_norm, safe_row_norm
from implicitgrad.linalg.symmetry import irregular, symmetry_tolerance


class CheckedSystem(NamedTuple):
    """A checked system ``A x = b``, free of autograd graphs and scaled row by row to |b| = 1.

    The scaling lets one set of thresholds serve right-hand sides of any size: squares of 1e-30 are zero in float32.
    """

    b: Tensor  # (..., m), rows of norm one or zero
    x0: Tensor | None  # (..., n), scaled like b
    scale: Tensor  # norms of the rows: 0-dimensional or (..., 1)
    zero: bool  # every right-hand side is zero


def check_system(
    name: str, A: LinearOperator, b: Tensor, x0: Tensor | None, rectangular: bool = False
) -> CheckedSystem:
    """Refuse what no solver can take; otherwise the system that it works on. One transfer from the device.

    Args:
        name: class name of the solver, for messages.
        A: the operator.
        b: right-hand sides, ``(..., m)``.
        x0: first guess, ``(..., n)``.
        rectangular: whether the solver takes operators that are not square.

    Raises:
        ValueError: `A` is not square; shape, dtype or device of `b` or `x0` do not fit `A`; complex numbers.
        FloatingPointError: NaN or infinity in `b` or `x0`.
    """
    if not (rectangular or A.is_square):
        raise ValueError(f"{name} needs a square operator; got {A}. Use LSMR or CGLS for least squares.")
    if b.is_complex():
        raise ValueError(f"{name} solves real systems; got b of {b.dtype}. Split it into real and imaginary part.")
    if (b.dtype, b.device) != (A.dtype, A.device):
        raise ValueError(f"{name} needs b in {A.dtype} on {A.device} like A; got {b.dtype} on {b.device}.")
    if A.image_shape not in (b.shape, b.shape[1:]):
        raise ValueError(
            f"{name} needs b of shape {A.image_shape}, or with a leading dimension for several right-hand sides;"
            f" got {tuple(b.shape)}."
        )
    wanted = (*b.shape[:-1], A.size)
    if x0 is not None and (x0.shape, x0.dtype, x0.device) != (wanted, b.dtype, b.device):
        raise ValueError(
            f"{name} needs x0 like b: {wanted}, {b.dtype} on {b.device};"
            f" got {tuple(x0.shape)}, {x0.dtype} on {x0.device}."
        )
    b = b.detach()
    finite = b.isfinite().all() if x0 is None else b.isfinite().all() & x0.isfinite().all()
    is_finite, is_nonzero = torch.stack((finite, b.any())).tolist()
    if not is_finite:
        raise FloatingPointError(f"{name} got NaN or infinity in b or x0; find out where it arose before solving.")
    if not is_nonzero:
        return CheckedSystem(b, None, torch.zeros_like(row_norm(b)), zero=True)
    norm = safe_row_norm(b)
    divisor = torch.where(norm > 0, norm, 1)
    start = None if x0 is None else torch.where(norm > 0, x0.detach() / divisor, 0).contiguous()
    return CheckedSystem((b / divisor).contiguous(), start, norm, zero=False)


def check_rtol(name: str, rtol: float | None) -> None:
    """Refuse a relative tolerance outside (0, 1).

    Raises:
        ValueError: with the value.
    """
    if rtol is not None and not (isinstance(rtol, (int, float)) and 0 < rtol < 1):
        raise ValueError(f"{name}(rtol=...) needs a number between 0 and 1, or None for the dtype's own; got {rtol!r}.")


def check_count(name: str, field: str, value: int | None, at_least: int = 1) -> None:
    """Refuse a count that is not an integer or too small; None passes, as "choose for me".

    Raises:
        ValueError: with the value.
    """
    if value is not None and not (isinstance(value, int) and value >= at_least):
        raise ValueError(f"{name}({field}=...) needs an integer of at least {at_least}; got {value!r}.")


def check_right_preconditioner(name: str, preconditioner: object) -> None:
    """Refuse a preconditioner that is not a function; None passes.

    Raises:
        ValueError: with the value; recipes are for symmetric systems.
    """
    if preconditioner is not None and (isinstance(preconditioner, type) or not callable(preconditioner)):
        raise ValueError(
            f"{name}(preconditioner=...) needs a function r -> z; got {preconditioner!r}. Recipes are read by CG; pass"
            f" recipe.build(A) of one that suits A."
        )


def default_rtol(A: LinearOperator) -> float:
    """Relative residual asked for when the caller names none: 1e-10 in float64, 1e-5 in float32, 1e-2 below.

    Ten times the noise of the products if that is more. Each leaves room above eps · cond(A) for matrices of moderate
    condition; what lies below that floor is reported as "precision floor".
    """
    return max({torch.float64: 1e-10, torch.float32: 1e-5}.get(A.dtype, 1e-2), 10 * A.noise)


class AsymmetryError(ValueError):
    """An operator was declared symmetric, but its products are not."""


def check_symmetric(A: LinearOperator, tolerance: float | None = None) -> None:
    """Refuse an operator declared symmetric whose products are not; costs two products.

    Args:
        A: any operator; one that is not declared symmetric passes at no cost.
        tolerance: largest `LinearOperator.symmetry_defect` allowed, relative; by default 4e-10 in float64, 7e-5 in
            float32, and ten times the operator's noise if that is more.

    Raises:
        AsymmetryError: the defect is above `tolerance`, or not a number.

    Example:
        >>> rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> A = LinearOperator(lambda v: rotation @ v, 2, symmetric=True, dtype=torch.float32, device="cpu")
        >>> check_symmetric(A)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        implicitgrad.linalg.checks.AsymmetryError: The operator was declared symmetric, but ...
    """
    if not A.symmetric:
        return
    limit = max(symmetry_tolerance(A.dtype), 10 * A.noise) if tolerance is None else tolerance
    defect = A.symmetry_defect()
    if not defect <= limit:
        raise AsymmetryError(
            f"The operator was declared symmetric, but <u, Av> and <v, Au> differ by {defect:.1e} (relative) where"
            f" {limit:.1e} is allowed. Declare symmetric=False with an rmatvec and solve with GMRES or LU; if the"
            f" products are only noisy (finite differences), pass a larger tolerance."
        )


def check_operator(A: LinearOperator, tolerance: float | None = None) -> None:
    """Refuse an operator whose products contradict each other or what is declared; costs three products.

    With fixed irregular vectors u and v, relative to the size of the products:

    * A v is the same a second time;
    * <u, Av> = <v, Au> if A is declared symmetric, <u, Av> = <Aᵀu, v> if it has a transposed product;
    * <v, Av> and <u, Au> are not below the `eigenvalue_floor`.

    One pair of vectors does not prove anything, but a mistake in code that computes products shows in almost any pair.

    Args:
        A: any operator.
        tolerance: largest relative difference taken for rounding; by default 4e-10 in float64, 7e-5 in float32, and
            ten times the operator's noise if that is more.

    Raises:
        FloatingPointError: NaN or infinity in a product.
        AsymmetryError: declared symmetric and is not.
        ValueError: any other contradiction, with its likely cause.

    Example:
        >>> drawn = torch.Generator().manual_seed(0)
        >>> A = LinearOperator(lambda v: v * torch.rand(2, generator=drawn), 2, dtype=torch.float32, device="cpu")
        >>> check_operator(A)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: The same product came out differently ...
    """
    limit = max(symmetry_tolerance(A.dtype), 10 * A.noise) if tolerance is None else tolerance
    dot, norm = torch.linalg.vecdot, lambda rows: torch.linalg.vector_norm(rows, dim=-1)
    v = irregular(torch.empty(A.vector_shape, dtype=A.dtype, device=A.device), 3**0.5)
    Av = (A @ v).detach()
    if not Av.isfinite().all():
        raise FloatingPointError(
            "A product of the operator with a finite vector has NaN or infinite entries; look for them in the data, the"
            " variables and the loss at this point, and for derivatives that do not exist there (sqrt at 0, log at 0)."
        )
    change = _largest_ratio(norm((A @ v).detach() - Av), norm(Av))
    if not change <= limit:
        raise ValueError(
            f"The same product came out differently the second time, by {change:.1e} (relative) where {limit:.1e} is"
            " allowed. Likely causes: dropout or other random numbers drawn anew in each product, a loader that"
            " shuffles or drops other examples each time, a nondeterministic kernel"
            " (torch.use_deterministic_algorithms)."
        )
    if not A.T.has_product:
        return
    u = irregular(torch.empty(A.image_shape, dtype=A.dtype, device=A.device))
    Atu = (A.T @ u).detach()
    gap = _largest_ratio((dot(u, Av) - dot(v, Atu)).abs(), norm(Av) + norm(Atu))
    if not gap <= limit:
        kind = "<v, Au>, though it was declared symmetric" if A.symmetric else "<Aᵀu, v>"
        raise (AsymmetryError if A.symmetric else ValueError)(
            f"<u, Av> differs from {kind}: by {gap:.1e} (relative) where {limit:.1e} is allowed. Likely causes: a"
            " derivative that leaves out part of the graph (a custom autograd function with a backward that cannot be"
            " differentiated), low precision (autocast, TF32), a wrong matvec or rmatvec."
        )
    if A.eigenvalue_floor is not None:
        lowest = min((dot(w, Aw) + limit * norm(Aw)).min().item() for w, Aw in ((v, Av), (u, Atu)))
        if lowest < A.eigenvalue_floor:
            raise ValueError(
                f"The operator was declared to have eigenvalues of at least {A.eigenvalue_floor}, but <v, Av> / <v, v>"
                f" is {lowest:.1e} for some v. Declare no eigenvalue_floor, or convex=False."
            )


def _largest_ratio(part: Tensor, whole: Tensor) -> float:
    return torch.where(part == 0, part, part / whole).amax().item()


def require_symmetric(name: str, A: LinearOperator, otherwise: str) -> None:
    """Refuse an operator that is not declared symmetric.

    Raises:
        ValueError: naming the solver to take instead.
    """
    if not A.symmetric:
        raise ValueError(
            f"{name} needs a symmetric operator; got {A}. Use {otherwise}, or declare symmetric=True if A is symmetric."
        )
