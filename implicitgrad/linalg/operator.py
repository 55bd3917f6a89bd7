"""Linear maps on flat vectors, known by their products.

Vectors are ``(n,)``; a block of right-hand sides is ``(k, n)``, right-hand sides first, because rows are contiguous
then. With ``batch_shape`` the operator is a stack of independent systems of one size (a block diagonal matrix that
is never written down): vectors are ``(*batch_shape, n)``, blocks ``(k, *batch_shape, n)``. An operator is square
unless `num_rows` says otherwise; solvers of square systems refuse a rectangular one.
"""

import math
from collections.abc import Callable, Hashable
from copy import copy
from typing import TypeVar, final, overload

import torch
from torch import Tensor

from implicitgrad.linalg.matrix import Product, block_product, by_rows, matrix_of, mixture, no_transpose, vector_product
from implicitgrad.linalg.structure import ShiftedInverse, Structure, combined, composed
from implicitgrad.linalg.symmetry import asymmetry, check_entries

Result = TypeVar("Result")


@final
class LinearOperator:
    """A matrix A of m rows and n columns, given by ``v -> A v``.

    Supports ``A @ v``, ``A @ B``, ``A.T``, ``A + B``, ``A - B``, ``scalar * A``, ``-A``. What is known about A is
    declared, not guessed: `symmetric`, `definite`, `eigenvalue_floor`. `check_symmetric` compares the first with two
    products. ``J.T @ J`` is known to be symmetric and positive semidefinite. Products may record an autograd graph if
    the given functions do; the solvers never do.

    Args:
        matvec: ``(*batch_shape, n) -> (*batch_shape, m)``, the product A v. It must leave its argument unchanged.
        size: n, the number of unknowns of one system.
        num_rows: m; n by default.
        rmatvec: the product Aᵀ v. Not read when `symmetric`: the transpose is A itself.
        matmat: the product with a block, ``(k, *batch_shape, n) -> (k, *batch_shape, n)``; by default one `matvec`
            per row.
        rmatmat: the same for Aᵀ; by default one `rmatvec` per row.
        dense: returns the matrix ``(*batch_shape, n, n)``, for whom n products are not the fastest way to it.
        dense_cost: products that `dense` spends, for the books.
        noise: relative error of the products beyond rounding, say by finite differences. Default tolerances of solvers
            stay ten times above it.
        symmetric: declares A = Aᵀ.
        definite: declares A symmetric positive definite; needs `symmetric`.
        eigenvalue_floor: a proven lower bound on the eigenvalues of a symmetric A: 0 for a sum of squares.
        shifted_inverse: ``lam -> (v -> (A + lam I)⁻¹ v)`` on ``(..., n)``, for a symmetric A that knows it.
        dtype: a real floating dtype, that of the vectors.
        device: the device of the vectors.
        batch_shape: leading shape of a stack of independent systems; empty for one system.

    Raises:
        ValueError: a declaration that needs `symmetric` without it, `symmetric` with m != n, a dtype that is not real
            floating, or `size` or `num_rows` below one.

    Example:
        >>> diagonal = torch.tensor([1.0, 2.0, 4.0])
        >>> A = LinearOperator(lambda v: diagonal * v, 3, symmetric=True, dtype=torch.float32, device="cpu")
        >>> A.damped(1.0) @ torch.ones(3)
        tensor([2., 3., 5.])
    """

    def __init__(
        self,
        matvec: Product,
        size: int,
        *,
        num_rows: int | None = None,
        rmatvec: Product | None = None,
        matmat: Product | None = None,
        rmatmat: Product | None = None,
        dense: Callable[[], Tensor] | None = None,
        dense_cost: int = 0,
        noise: float = 0.0,
        symmetric: bool = False,
        definite: bool = False,
        eigenvalue_floor: float | None = None,
        shifted_inverse: ShiftedInverse | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        batch_shape: tuple[int, ...] = (),
    ):
        if not dtype.is_floating_point:
            raise ValueError(f"LinearOperator needs a real floating dtype; got {dtype}. Split a complex system in two.")
        num_rows = size if num_rows is None else num_rows
        if min(size, num_rows) < 1:
            raise ValueError(f"LinearOperator needs size >= 1 and num_rows >= 1; got {size} and {num_rows}.")
        if symmetric and num_rows != size:
            raise ValueError(f"A symmetric operator is square; got {num_rows} rows and {size} columns.")
        self.size = size
        self.num_rows = num_rows
        self._structure = Structure(symmetric, definite, eigenvalue_floor, shifted_inverse, noise)
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device  # with its index, as tensors carry it
        self.batch_shape = tuple(batch_shape)
        self._matvec = matvec
        self._matmat = matmat or by_rows(matvec)
        self._rmatvec = rmatvec or no_transpose
        self._rmatmat = rmatmat or by_rows(self._rmatvec)
        self._dense = dense
        self._dense_cost = dense_cost
        self._base: LinearOperator | None = None
        self._terms: tuple[LinearOperator, ...] = ()
        self._memo: dict[Hashable, object] = {}

    @classmethod
    def from_dense(cls, matrix: Tensor, symmetric: bool = False, definite: bool = False) -> "LinearOperator":
        """The operator of a given matrix.

        Args:
            matrix: ``(*batch_shape, m, n)``.
            symmetric: declares the matrix symmetric; compared with its entries here, as that costs no product.
            definite: declares it positive definite; `Cholesky` finds out, nothing else does.

        Raises:
            ValueError: not a matrix, or declared symmetric and is not.

        Example:
            >>> LinearOperator.from_dense(torch.eye(2), symmetric=True, definite=True) @ torch.tensor([1.0, 2.0])
            tensor([1., 2.])
        """
        if matrix.ndim < 2:
            raise ValueError(f"from_dense needs a matrix of shape (*batch, m, n); got {tuple(matrix.shape)}.")
        if symmetric and matrix.shape[-1] == matrix.shape[-2]:
            check_entries(matrix)
        operator = cls(
            vector_product(matrix),
            matrix.shape[-1],
            num_rows=matrix.shape[-2],
            symmetric=symmetric,
            definite=definite,
            dtype=matrix.dtype,
            device=matrix.device,
            batch_shape=tuple(matrix.shape[:-2]),
        )
        operator._act_through(matrix)
        return operator

    def _act_through(self, matrix: Tensor) -> None:
        self._matvec, self._rmatvec = vector_product(matrix), vector_product(matrix.mT)
        self._matmat, self._rmatmat = block_product(matrix), block_product(matrix.mT)
        self._dense, self._dense_cost, self._terms = lambda: matrix, 0, ()

    def __repr__(self) -> str:
        structure = "definite" if self.definite else "symmetric" if self.symmetric else "no declared structure"
        size = f"size={self.size}" if self.is_square else f"shape={self.shape}"
        return f"LinearOperator({size}, batch_shape={self.batch_shape}, {self.dtype}, {structure})"

    @property
    def symmetric(self) -> bool:
        """Whether A = Aᵀ was declared, or follows."""
        return self._structure.symmetric

    @property
    def definite(self) -> bool:
        """Whether A is declared symmetric positive definite, or that follows."""
        return self._structure.definite

    @property
    def eigenvalue_floor(self) -> float | None:
        """A proven lower bound on the eigenvalues of a symmetric A; None if there is none."""
        return self._structure.eigenvalue_floor

    @property
    def noise(self) -> float:
        """Relative error of the products beyond rounding."""
        return self._structure.noise

    @property
    def known_inverse(self) -> Product | None:
        """``v -> A⁻¹ v`` on ``(..., n)`` for an operator that knows its inverse; None for the rest."""
        return self._structure.inverse

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of one system."""
        return self.num_rows, self.size

    @property
    def is_square(self) -> bool:
        """Whether m = n."""
        return self.num_rows == self.size

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of one vector v, ``(*batch_shape, n)``."""
        return (*self.batch_shape, self.size)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one product A v, ``(*batch_shape, m)``."""
        return (*self.batch_shape, self.num_rows)

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, v: "LinearOperator") -> "LinearOperator": ...

    def __matmul__(self, v: "Tensor | LinearOperator") -> "Tensor | LinearOperator":
        if isinstance(v, LinearOperator):
            return _composition(self, v)
        return self._product(v)

    def _product(self, v: Tensor) -> Tensor:
        shape = self.vector_shape
        if v.dtype != self.dtype:
            raise ValueError(f"A @ v needs v in {self.dtype} like A; got {v.dtype}.")
        if v.shape == shape:
            out = self._matvec(v)
        elif v.shape[1:] == shape:
            out = self._matmat(v)
        else:
            raise ValueError(
                f"A @ v needs v of shape {shape}, or (k, {', '.join(map(str, shape))}) for k right-hand sides;"
                f" got {tuple(v.shape)}."
            )
        wanted = (*v.shape[:-1], self.num_rows)
        if out.shape != wanted or out.dtype != self.dtype:
            raise ValueError(
                f"The product of a {tuple(v.shape)} tensor came back as {tuple(out.shape)}, {out.dtype}; wanted"
                f" {wanted} in {self.dtype}. Correct the function given as matvec, matmat, rmatvec or rmatmat."
            )
        return out

    @property
    def base(self) -> "LinearOperator":
        """The operator that keeps the memo: A for both A and ``A.T``."""
        return self if self._base is None else self._base

    @property
    def transposed(self) -> bool:
        """Whether this is the transpose of `base`."""
        return self._base is not None

    @property
    def has_product(self) -> bool:
        """False only for ``A.T`` of an operator that was made without `rmatvec`."""
        return self._matvec is not no_transpose

    @property
    def T(self) -> "LinearOperator":
        """Aᵀ: A itself when symmetric, otherwise a view on A that shares its memo (so ``A.T.T is A``)."""
        if self.symmetric:
            return self
        if self._base is not None:
            return self._base
        view = copy(self)
        view._matvec, view._rmatvec = self._rmatvec, self._matvec
        view._matmat, view._rmatmat = self._rmatmat, self._matmat
        view.size, view.num_rows = self.num_rows, self.size
        view._base = self  # A holds no reference to its view: such a cycle would keep autograd graphs alive
        return view

    def damped(self, damping: float) -> "LinearOperator":
        """A + damping · I, with A's structure, A's known inverse and A's matrix if that is remembered.

        `damping` must be finite (ValueError). It moves `eigenvalue_floor`; a negative one may so give up `definite`.
        """
        if not math.isfinite(damping):
            raise ValueError(f"damping must be finite; got {damping}.")
        return _combination([(1.0, self)], float(damping))

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        if not isinstance(other, LinearOperator):
            return NotImplemented
        mine = (self.batch_shape, self.shape, self.dtype, self.device)
        theirs = (other.batch_shape, other.shape, other.dtype, other.device)
        if mine != theirs:
            raise ValueError(f"A + B needs one batch shape, shape, dtype and device; got {mine} and {theirs}.")
        return _combination([(1.0, self), (1.0, other)], 0.0)

    def __rmul__(self, scalar: float) -> "LinearOperator":
        if not isinstance(scalar, (int, float)):
            return NotImplemented
        return _combination([(float(scalar), self)], 0.0)

    __mul__ = __rmul__

    def __neg__(self) -> "LinearOperator":
        return -1.0 * self

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return self + -1.0 * other if isinstance(other, LinearOperator) else NotImplemented

    def restricted(self, index: Tensor) -> "LinearOperator":
        """The principal submatrix A[index][:, index], at the cost of a product with A each time.

        Args:
            index: ``(k,)`` different positions, or a mask ``(n,)`` of booleans.

        Raises:
            ValueError: A is not square, or the index names a position twice, outside of A, or none at all.

        Example:
            >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, 2.0, 3.0])), symmetric=True)
            >>> A.restricted(torch.tensor([0, 2])) @ torch.ones(2)
            tensor([1., 3.])
        """
        return _restriction(self, index)

    def to_dense(self) -> Tensor:
        """The matrix ``(*batch_shape, m, n)``, remembered. Do not change it in place.

        Costs `dense_cost` products and m n numbers of memory per system. ValueError if `dense` returns another shape.
        """
        if self._base is not None:
            return self._base.to_dense().mT
        return self.remember("dense", self._make_dense)

    @property
    def dense_cost(self) -> int:
        """Products that `to_dense` would spend now: n by columns, what was declared for `dense`, 0 if remembered."""
        if self._base is not None:
            return self._base.dense_cost
        if "dense" in self._memo:
            return 0
        if self._dense is None:
            return self.size
        return self._dense_cost + sum(term.dense_cost for term in self._terms)

    def _make_dense(self) -> Tensor:
        matrix = self._dense() if self._dense is not None else matrix_of(self._product, self._example())
        if matrix.shape != (*self.image_shape, self.size):
            raise ValueError(f"dense() returned shape {tuple(matrix.shape)}; wanted {(*self.image_shape, self.size)}.")
        return matrix

    def without_graph(self) -> "LinearOperator | None":
        """This operator through its remembered matrix, factors included; None if no matrix is remembered.

        Lets go of the functions given at construction, and so of the autograd graph that they hold.
        """
        if "dense" not in self.base._memo:
            return None
        known = copy(self.base)
        known._act_through(self.base.to_dense())
        known._structure = self._structure.without_inverse()
        return known.T if self.transposed else known

    def remember(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """``make()`` at the first call with this key, the stored result afterwards; A and ``A.T`` share the store.

        What is stored should describe `base` (a factor of A serves Aᵀ as well) and must not refer to the operator.
        """
        memo = self.base._memo
        if key not in memo:
            memo[key] = make()
        return memo[key]  # pyright: ignore[reportReturnType]

    def symmetry_defect(self, generator: torch.Generator | None = None) -> float:
        """How far A is from symmetric, seen by one pair of vectors; zero for a symmetric A, up to rounding.

        ``|<u, Av> - <v, Au>| / (|u| |Av| + |v| |Au|)``, the largest over a stack of systems. A random matrix gives
        about 1/√n. Costs two products.

        Args:
            generator: draws u and v; by default they are fixed irregular sequences, which need no random numbers.
        """
        return asymmetry(self._product, self._example(), generator)

    def _example(self) -> Tensor:
        return torch.empty(self.vector_shape, dtype=self.dtype, device=self.device)


def _combination(terms: list[tuple[float, LinearOperator]], shift: float) -> LinearOperator:
    """Σ cᵢ Aᵢ + shift · I."""
    scales = [scale for scale, _ in terms]
    operators = [term for _, term in terms]
    first = operators[0]
    if shift and not first.is_square:
        raise ValueError(f"A + damping I needs a square operator; got {first}.")

    def product(factors: list[LinearOperator]) -> Product:
        if not all(factor.has_product for factor in factors):
            return no_transpose
        return lambda v: mixture(scales, [factor @ v for factor in factors], shift, v)

    def dense() -> Tensor:
        identity = torch.eye(first.size, dtype=first.dtype, device=first.device)
        return mixture(scales, [term.to_dense() for term in operators], shift, identity)

    forward, backward = product(operators), product([term.T for term in operators])
    structure = combined(scales, [term._structure for term in operators], shift)
    return _derived(operators, forward, backward, dense, structure, first.num_rows, first.size)


def _composition(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """A B."""
    if (left.vector_shape, left.dtype, left.device) != (right.image_shape, right.dtype, right.device):
        raise ValueError(
            f"A @ B needs as many columns of A as rows of B, one dtype and one device; got {left}, {right}."
        )

    def product(first: LinearOperator, second: LinearOperator) -> Product:
        if not (first.has_product and second.has_product):
            return no_transpose
        return lambda v: second @ (first @ v)

    gram = left.base is right.base and (left.transposed != right.transposed or left.symmetric)
    structure = composed(left._structure, right._structure, gram)
    forward = product(right, left)
    backward = forward if gram else product(left.T, right.T)
    dense = lambda: left.to_dense() @ right.to_dense()
    return _derived([left, right], forward, backward, dense, structure, left.num_rows, right.size)


def _restriction(A: LinearOperator, index: Tensor) -> LinearOperator:
    """A[index][:, index]."""
    if not A.is_square:
        raise ValueError(f"A principal submatrix needs a square operator; got {A}.")
    chosen = index.nonzero().squeeze(-1) if index.dtype == torch.bool else index
    if index.ndim != 1 or index.dtype == torch.bool and len(index) != A.size:
        raise ValueError(f"restricted needs (k,) positions or a mask of ({A.size},); got shape {tuple(index.shape)}.")
    if len(chosen) == 0 or len(chosen.unique()) < len(chosen) or chosen.min() < 0 or chosen.max() >= A.size:
        raise ValueError(f"restricted needs different positions from 0 to {A.size - 1}, at least one; got {index}.")

    def product(factor: LinearOperator) -> Product:
        def inside(v: Tensor) -> Tensor:
            padded = v.new_zeros(*v.shape[:-1], factor.size).index_copy(-1, chosen, v)
            return (factor @ padded).index_select(-1, chosen)

        return inside if factor.has_product else no_transpose

    def dense() -> Tensor:
        return A.to_dense().index_select(-1, chosen).index_select(-2, chosen)

    known = "dense" in A.base._memo
    return _derived(
        [A] if known else [],
        product(A),
        product(A.T),
        dense if known else None,
        A._structure.without_inverse(),
        len(chosen),
        len(chosen),
        like=A,
    )


def _derived(
    terms: list[LinearOperator],
    forward: Product,
    backward: Product,
    dense: Callable[[], Tensor] | None,
    structure: Structure,
    num_rows: int,
    size: int,
    like: LinearOperator | None = None,
) -> LinearOperator:
    """An operator made of others, whose matrix costs what theirs cost."""
    like = like or terms[0]
    result = LinearOperator(
        forward,
        size,
        num_rows=num_rows,
        rmatvec=backward,
        matmat=forward,
        rmatmat=backward,
        dense=dense,
        dtype=like.dtype,
        device=like.device,
        batch_shape=like.batch_shape,
    )
    result._structure = structure
    result._terms = tuple(terms)
    return result
