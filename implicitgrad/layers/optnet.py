"""A layer whose output solves a quadratic program with learned matrices."""

import torch
from torch import Tensor, nn

from implicitgrad.solvers.qp import solve_qp
from implicitgrad.solvers.qp_interior_point import QPInteriorPoint
from implicitgrad.solvers.solver import InnerSolver, SolverInfo


class OptNetLayer(nn.Module):
    """`c ↦ argmin_z zᵀQz / 2 + cᵀz` subject to `A z = b`, `G z <= h`, all but c learned; a batch at once.

    `Q = L Lᵀ + ridge I` with a lower triangular parameter L, `b = A z₀` and `h = G z₀ + exp(log_slack)`, so that the
    program is feasible (at z₀) and bounded for all parameters, and its solution unique. Gradients reach c and all
    parameters by the implicit function theorem. For matrices that depend on the example use `solve_qp`.

    Q is factorised once for a batch; each of some ten iterations factorises an `(m, m)` matrix per example, see
    `QPInteriorPoint`. Use float64 (`layer.double()`): interior points in float32 stop near 1e-4.

    Source: Amos and Kolter (2017), "OptNet: differentiable optimization as a layer in neural networks", section 3; the
    slack is theirs with an exponential, which keeps it positive.

    Args:
        num_variables: n, the width of c and z.
        num_equalities: Rows of A, fewer than n.
        num_inequalities: Rows of G.
        ridge: Lower bound on the eigenvalues of Q.
        solver: `QPInteriorPoint()`, the default, or `QPPackage()`.
        generator: Draws the parameters; by default a fresh one with seed 0.

    Attributes:
        info: What happened in the newest solve; None before the first.

    Raises:
        ValueError: sizes or `ridge` out of range; in `forward`, c of another width.

    Example:
        >>> import torch
        >>> layer = OptNetLayer(4, num_equalities=1, num_inequalities=6).double()
        >>> z = layer(torch.zeros(3, 4, dtype=torch.float64))
        >>> z.sum().backward()
        >>> z.shape, layer.lower.grad.shape, layer.info.converged
        (torch.Size([3, 4]), torch.Size([4, 4]), True)
    """

    def __init__(
        self,
        num_variables: int,
        num_equalities: int = 0,
        num_inequalities: int = 0,
        *,
        ridge: float = 1e-3,
        solver: InnerSolver | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        n, p, m = num_variables, num_equalities, num_inequalities
        if not (n >= 1 and 0 <= p < n and m >= 0):
            raise ValueError(f"OptNetLayer needs n >= 1 variables, 0 <= p < n equalities, m >= 0; got {n}, {p}, {m}")
        if not ridge > 0:
            raise ValueError(f"OptNetLayer needs a positive ridge, got {ridge}")
        draw = generator or torch.Generator().manual_seed(0)
        normal = lambda *shape: nn.Parameter(torch.randn(*shape, generator=draw) / n**0.5)
        self.ridge = ridge
        self.solver = QPInteriorPoint() if solver is None else solver
        self.info: SolverInfo | None = None
        self.lower = nn.Parameter(torch.eye(n) + normal(n, n).detach().tril(-1))
        self.A = normal(p, n)
        self.G = normal(m, n)
        self.feasible_point = nn.Parameter(torch.zeros(n))
        self.log_slack = nn.Parameter(torch.zeros(m))

    def matrices(self) -> dict[str, Tensor]:
        """Q, and where there are such constraints A, b, G, h; differentiable in the parameters."""
        lower = self.lower.tril()
        found = {"Q": lower @ lower.mT + self.ridge * torch.eye(len(lower), dtype=lower.dtype, device=lower.device)}
        if len(self.A):
            found |= {"A": self.A, "b": self.A @ self.feasible_point}
        if len(self.G):
            found |= {"G": self.G, "h": self.G @ self.feasible_point + self.log_slack.exp()}
        return found

    def forward(self, c: Tensor) -> Tensor:
        """The solutions `(..., n)` for `c: (..., n)`."""
        if c.shape[-1:] != self.feasible_point.shape:
            raise ValueError(f"OptNetLayer needs c of shape (..., {len(self.feasible_point)}), got {tuple(c.shape)}")
        y, self.info = solve_qp({**self.matrices(), "c": c}, solver=self.solver)
        return y["primal"]

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        sizes = len(self.feasible_point), len(self.A), len(self.G)
        return "num_variables={}, num_equalities={}, num_inequalities={}".format(*sizes)
