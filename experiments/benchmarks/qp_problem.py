"""Random quadratic programs with a known strictly complementary solution, and their exact gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

Problem = dict[str, Tensor]


@dataclass(frozen=True)
class RandomPrograms:
    """A stack of programs `min zᵀQz / 2 + cᵀz` subject to `A z = b`, `G z <= h`, in float64.

    Attributes:
        size: B, how many.
        num_variables: n.
        num_equalities: p.
        num_inequalities: m.
        num_active: The first so many inequalities hold with equality at the solution, with multipliers in [0.5, 1.5];
            the others have slacks in that range.
    """

    size: int = 64
    num_variables: int = 100
    num_equalities: int = 50
    num_inequalities: int = 100
    num_active: int = 33

    def draw(self, seed: int = 0) -> tuple[Problem, Tensor]:
        """The programs, and their solutions `(B, n)`."""
        generator = torch.Generator().manual_seed(seed)
        n, p, m = self.num_variables, self.num_equalities, self.num_inequalities
        normal = lambda *shape: torch.randn(self.size, *shape, generator=generator, dtype=torch.float64)
        uniform = lambda size: 0.5 + torch.rand(self.size, size, generator=generator, dtype=torch.float64)
        root, A, G, z, nu = normal(n, n), normal(p, n) / n**0.5, normal(m, n) / n**0.5, normal(n), normal(p)
        active = torch.arange(m) < self.num_active
        lam, slack = torch.where(active, uniform(m), 0), torch.where(active, 0, uniform(m))
        Q = root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
        c = -(_apply(Q, z) + _apply(A.mT, nu) + _apply(G.mT, lam))
        return {"Q": Q, "c": c, "A": A, "b": _apply(A, z), "G": G, "h": _apply(G, z) + slack}, z

    def exact_solution(self, problem: Problem) -> Tensor:
        """z by the inverse of the system of the active constraints; autograd differentiates it."""
        k, n = self.num_active, self.num_variables
        Q = (problem["Q"] + problem["Q"].mT) / 2
        J = torch.cat([problem["A"], problem["G"][:, :k]], -2)
        corner = J.new_zeros(len(J), J.shape[-2], J.shape[-2])
        matrix = torch.cat([torch.cat([Q, J.mT], -1), torch.cat([J, corner], -1)], -2)
        right = torch.cat([-problem["c"], problem["b"], problem["h"][:, :k]], -1)
        return _apply(torch.linalg.inv(matrix), right)[:, :n]

    def exact_gradients(self, problem: Problem, weights: Tensor) -> Problem:
        """Gradients of `(weights · z).sum()`; with respect to the symmetric part of Q."""
        leaves = {name: part.clone().requires_grad_() for name, part in problem.items()}
        found = torch.autograd.grad((self.exact_solution(leaves) * weights).sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
