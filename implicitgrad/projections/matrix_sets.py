"""Projections onto sets of matrices that are given by their spectrum.

Their derivatives are divided differences of eigenvalues, which are right where eigenvalues or singular values repeat;
the derivative of an eigendecomposition itself, which torch would use, is infinite there. Each rule calls only functions
with rules of the same kind, so derivatives of every order follow.
"""

from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure
from implicitgrad.below import batch_in_front
from implicitgrad.projections import checks
from implicitgrad.projections.nested_forward import refuse_nested_forward_mode


def psd_cone(y: Tensor) -> Tensor:
    r"""The nearest positive semidefinite matrix `{Z : Z = Zᵀ, Z ⪰ 0}`.

    For `(y + yᵀ)/2 = V diag(λ) Vᵀ` it is `V diag(max(λ, 0)) Vᵀ`, with the derivative
    $H \mapsto V (\Gamma \circ V^T H V) V^T$, where $\Gamma_{ij} = 1$ for $\lambda_i, \lambda_j > 0$, 0 for
    $\lambda_i, \lambda_j \le 0$, and $\lambda_i / (\lambda_i - \lambda_j)$ for $\lambda_i > 0 \ge \lambda_j$. So
    eigenvalues may repeat. The map is smooth where no eigenvalue is zero; at zero eigenvalues this is an element of the
    generalised Jacobian. Costs one eigendecomposition, and four matrix products per derivative product.

    Args:
        y: `(*batch, n, n)`; only the symmetric part counts.

    Raises:
        ValueError: y is not square.
        FloatingPointError: NaN or infinity in y. Inside `torch.func` transforms, where values cannot be read, NaN.
        NotImplementedError: two nested forward-mode transforms.

    Source: Higham (1988), "Computing a nearest symmetric positive semidefinite matrix"; Daleckii and Krein (1965) for
    the derivative; Malick and Sendov (2006) at zero eigenvalues. Second derivatives from `|S|² = S²`.

    Example:
        >>> psd_cone(torch.diag(torch.tensor([2.0, -1.0])))
        tensor([[2., 0.],
                [0., 0.]])
    """
    check_matrix("psd_cone", y, square=True)
    y = checks.checked("psd_cone", y, {})
    return _Psd.apply((y + y.mT) / 2)[0]


def stiefel(y: Tensor) -> Tensor:
    r"""The nearest matrix with orthonormal columns, `{Q : QᵀQ = I}`; rows if there are fewer rows than columns.

    It is the polar factor `U Vᵀ` of `y = U diag(σ) Vᵀ`; for a square y the nearest orthogonal matrix. Unique, and
    smooth, where y has full rank, also at repeated singular values. With `H = QᵀY` the derivative along E is
    `Q W + (E - Q QᵀE) H⁻¹`, where `W H + H W = QᵀE - EᵀQ`. Costs one singular value decomposition, and ten products of
    m × m and n × m matrices per derivative product.

    Args:
        y: `(*batch, n, m)`.

    Raises:
        ValueError: y is no matrix.
        FloatingPointError: NaN or infinity in y. Inside `torch.func` transforms, where values cannot be read, NaN.
        torch.linalg.LinAlgError: in a derivative, where y has not full rank and there is none.
        NotImplementedError: two nested forward-mode transforms.

    Source: Fan and Hoffman (1955); Kenney and Laub (1991), "Polar decomposition and matrix sign function condition
    estimates", for the derivative.

    Example:
        >>> stiefel(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    check_matrix("stiefel", y, square=False)
    y = checks.checked("stiefel", y, {})
    (y,) = closure.shown([y])
    return _Polar.apply(y.mT)[0].mT if y.shape[-2] < y.shape[-1] else _Polar.apply(y)[0]


def check_matrix(name: str, y: Tensor, square: bool) -> None:
    """Raise unless `y` is a stack of matrices with entries.

    Raises:
        TypeError: no floating point tensor.
        ValueError: another shape.
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{name} needs a floating point tensor, got {got}; for a tree project each matrix by itself")
    if y.dim() < 2 or 0 in y.shape[-2:] or square and y.shape[-1] != y.shape[-2]:
        wanted = "(*batch, n, n)" if square else "(*batch, n, m)"
        raise ValueError(f"{name} needs a matrix of shape {wanted} with n >= 1, got {tuple(y.shape)}")


class _Psd(torch.autograd.Function):
    """Symmetric S ↦ its positive part, with eigenvalues and eigenvectors as constants."""

    @staticmethod
    def forward(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        safe, bad = _without_nan(S)
        values, vectors = torch.linalg.eigh(safe)
        positive = vectors * values.clamp(min=0).unsqueeze(-2) @ vectors.mT
        return positive.masked_fill(bad, torch.nan), values, vectors.masked_fill(bad, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _keep(ctx, (*inputs, *output[1:]), output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> Tensor:
        S, values, vectors = ctx.saved_tensors
        return _PsdDerivative.apply(S, _symmetric(cotangent), values, vectors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
        refuse_nested_forward_mode()
        S, values, vectors = ctx.saved_tensors
        return _PsdDerivative.apply(S, tangent, values, vectors), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *tensors: Tensor) -> tuple:
        return _Psd.apply(*batch_in_front(info.batch_size, in_dims, tensors)), (0, 0, 0)


class _PsdDerivative(torch.autograd.Function):
    """S, H ↦ derivative of `_Psd` at S along the symmetric H: self-adjoint in H."""

    @staticmethod
    def forward(S: Tensor, H: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        positive = values.clamp(min=0)
        mixed = positive.unsqueeze(-1) / (values.unsqueeze(-1) - values.clamp(max=0).unsqueeze(-2))
        above = values > 0
        both = above.unsqueeze(-1) & above.unsqueeze(-2)
        one = above.unsqueeze(-1) & ~above.unsqueeze(-2)
        ratio = torch.where(one, mixed, 0)
        return _rotated(vectors, H, both + ratio + ratio.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        S, H, values, vectors = ctx.saved_tensors
        cotangent = _symmetric(cotangent)
        through = _second(S, H, cotangent, values, vectors) if ctx.needs_input_grad[0] else None
        return through, _PsdDerivative.apply(S, cotangent, values, vectors), None, None

    @staticmethod
    def jvp(ctx: Any, S_dot: Tensor, H_dot: Tensor, *_: None) -> Tensor:
        refuse_nested_forward_mode()
        S, H, values, vectors = ctx.saved_tensors
        along = _PsdDerivative.apply(S, H_dot, values, vectors)
        return along + _second(S, H, S_dot, values, vectors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *tensors: Tensor) -> tuple:
        return _PsdDerivative.apply(*batch_in_front(info.batch_size, in_dims, tensors)), 0


def _second(S: Tensor, H: Tensor, K: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Second derivative of `_Psd` along H and K, from that of `|S| = 2 P - S` in `|S|² = S²`."""
    A, B = (2 * _PsdDerivative.apply(S, D, values, vectors) - D for D in (H, K))
    right = H @ K + K @ H - A @ B - B @ A
    return _Sylvester.apply(2 * _Psd.apply(S)[0] - S, right, values.abs(), vectors) / 2


class _Sylvester(torch.autograd.Function):
    """H, C ↦ W with `H W + W H = C`, for a positive semidefinite `H = V diag(values) Vᵀ`."""

    @staticmethod
    def forward(H: Tensor, C: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        return _rotated(vectors, C, torch.where(sums > 0, 1 / sums, 0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        H, _, values, vectors = inputs
        _keep(ctx, (H, output, values, vectors))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None, None]:
        H, W, values, vectors = ctx.saved_tensors
        C_bar = _Sylvester.apply(H, cotangent, values, vectors)
        return -(C_bar @ W.mT + W.mT @ C_bar), C_bar, None, None

    @staticmethod
    def jvp(ctx: Any, H_dot: Tensor, C_dot: Tensor, *_: None) -> Tensor:
        refuse_nested_forward_mode()
        H, W, values, vectors = ctx.saved_tensors
        return _Sylvester.apply(H, C_dot - H_dot @ W - W @ H_dot, values, vectors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *tensors: Tensor) -> tuple:
        return _Sylvester.apply(*batch_in_front(info.batch_size, in_dims, tensors)), 0


class _Polar(torch.autograd.Function):
    """Y with at least as many rows as columns ↦ its polar factor; singular values, right vectors as constants."""

    @staticmethod
    def forward(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        safe, bad = _without_nan(Y)
        left, values, right = torch.linalg.svd(safe, full_matrices=False)
        return (left @ right).masked_fill(bad, torch.nan), values, right.mT.masked_fill(bad, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _keep(ctx, (*inputs, *output), output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> Tensor:
        Y, Q, values, vectors = ctx.saved_tensors
        return _polar_derivative(Y, Q, values, vectors, cotangent)  # self-adjoint: U Vᵀ is the gradient of Σσ

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
        refuse_nested_forward_mode()
        Y, Q, values, vectors = ctx.saved_tensors
        return _polar_derivative(Y, Q, values, vectors, tangent), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *tensors: Tensor) -> tuple:
        return _Polar.apply(*batch_in_front(info.batch_size, in_dims, tensors)), (0, 0, 0)


def _polar_derivative(Y: Tensor, Q: Tensor, values: Tensor, vectors: Tensor, E: Tensor) -> Tensor:
    H, inner = _symmetric(Q.mT @ Y), Q.mT @ E
    along = Q @ _Sylvester.apply(H, inner - inner.mT, values, vectors)
    if Y.shape[-2] == Y.shape[-1]:
        return along
    return along + (E - Q @ inner) @ torch.linalg.inv(H)


def _keep(ctx: Any, tensors: tuple, constants: tuple = ()) -> None:
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _without_nan(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros in place of matrices with NaN or infinity, which torch.linalg refuses, and where those are."""
    bad = ~matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return matrix.masked_fill(bad, 0), bad


def _rotated(vectors: Tensor, H: Tensor, weights: Tensor) -> Tensor:
    """`V (weights ∘ VᵀHV) Vᵀ`."""
    return vectors @ (weights * (vectors.mT @ H @ vectors)) @ vectors.mT


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
