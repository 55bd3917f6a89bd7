"""How many products CG spends, beside SciPy's CG on the same product, and how small the residual really is.

The system is the Hessian of a logistic regression, 10 000 examples with 1000 features whose scales fall from 1 to 0.1,
damped by 1e-4; right-hand sides are random. "first" are the products until the residual of the recurrence meets the
tolerance, which is where SciPy stops; the rest are true residuals and refinement. Residuals are `|b - A x| / |b|` with
products in float64. The second table scales a system of condition number 100 and its right-hand side.

Run: python -m experiments.benchmarks.cg_products
"""

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicitgrad.linalg import CG, LinearOperator

NUM_SIDES = 5


def logistic_hessian(dtype: torch.dtype) -> LinearOperator:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    features = draw(10_000, 1000) * torch.logspace(0, -1, 1000, dtype=torch.float64)
    probability = torch.sigmoid(features @ draw(1000) / 10)
    weight = (probability * (1 - probability) / len(features)).to(dtype)
    features = features.to(dtype)
    return LinearOperator(
        lambda v: features.T @ (weight * (features @ v)) + 1e-4 * v,
        1000,
        symmetric=True,
        eigenvalue_floor=1e-4,
        dtype=dtype,
        device="cpu",
    )


def relative_residual(exact: LinearOperator, b: Tensor, x: Tensor) -> float:
    return ((b.double() - exact @ x.double()).norm() / b.double().norm()).item()


def scipy_cg(A: LinearOperator, b: Tensor, rtol: float) -> tuple[Tensor, int]:
    """The solution and the number of products."""
    count = 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return (A @ torch.from_numpy(v)).numpy()

    operator = scipy.sparse.linalg.LinearOperator((A.size, A.size), matvec=product, dtype=b.numpy().dtype)  # pyright: ignore[reportCallIssue]
    x, _ = scipy.sparse.linalg.cg(operator, b.numpy(), rtol=rtol, maxiter=5000)
    return torch.from_numpy(x), count


def products() -> None:
    print(
        f"{'dtype':<8} {'rtol':>5} {'SciPy':>6} {'first':>6} {'ratio':>6} {'all':>6} {'extra':>6}"
        f" {'SciPy res.':>10} {'our res.':>9}  reasons"
    )
    exact = logistic_hessian(torch.float64)
    sides = torch.randn(NUM_SIDES, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for dtype, rtols in ((torch.float32, (1e-3, 1e-5, 1e-6)), (torch.float64, (1e-5, 1e-8, 1e-10))):
        A = logistic_hessian(dtype)
        for rtol in rtols:
            theirs, first, every, worst, ours, reasons = 0, 0, 0, 0.0, 0.0, set()
            for b in sides.to(dtype):
                x, count = scipy_cg(A, b, rtol)
                solution = CG(rtol, max_iter=5000).solve(A, b)
                theirs, every = theirs + count, every + solution.num_matvec
                first += CG(rtol, max_iter=5000, num_refinements=0).solve(A, b).num_iter
                worst = max(worst, relative_residual(exact, b, x))
                ours = max(ours, relative_residual(exact, b, solution.value))
                reasons.add(solution.reason)
            print(
                f"{str(dtype)[6:]:<8} {rtol:>5.0e} {theirs:>6} {first:>6} {first / theirs:>6.3f} {every:>6}"
                f" {every / first - 1:>6.1%} {worst:>10.1e} {ours:>9.1e}  {', '.join(sorted(reasons))}"
            )


def scales() -> None:
    generator = torch.Generator().manual_seed(2)
    basis, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.linspace(0.01, 1, 200, dtype=torch.float64)) @ basis.T
    matrix = (matrix + matrix.T) / 2
    x = torch.randn(200, generator=generator, dtype=torch.float64)
    print(f"\n{'scale of A':>10} {'of b':>6} {'iterations':>10} {'residual':>9} {'error of x':>10}  reason")
    for scale in (1e-12, 1.0, 1e12):
        for size in (1e-12, 1.0, 1e12):
            A = LinearOperator.from_dense(scale * matrix, symmetric=True)
            solution = CG(1e-10).solve(A, size * (matrix @ x))
            error = ((solution.value * (scale / size) - x).norm() / x.norm()).item()
            print(
                f"{scale:>10.0e} {size:>6.0e} {solution.num_iter:>10} {solution.relative_residual.item():>9.1e}"
                f" {error:>10.1e}  {solution.reason}"
            )


def main() -> None:
    print(f"torch {torch.__version__}; sums over {NUM_SIDES} right-hand sides")
    products()
    scales()


if __name__ == "__main__":
    main()
