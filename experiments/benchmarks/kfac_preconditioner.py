"""Does K-FAC pay as a preconditioner of CG? Iterations on damped Gauss-Newton systems of a trained perceptron.

784-256-10 with tanh on 512 images of Fashion-MNIST after 50 steps of Adam, the gradient as right-hand side, residual
1e-5. K-FAC is inverted at the damping of the system and at ten times that.

Run: IMPLICITGRAD_DATA=... python -m experiments.benchmarks.kfac_preconditioner
"""

import torch
from torch import nn

import implicitgrad as ig
from experiments.images import load_images
from implicitgrad.curvature import gauss_newton, kfac
from implicitgrad.linalg import CG, LinearOperator

DAMPINGS = (1e-1, 1e-2, 1e-3)
NUM_IMAGES, NUM_STEPS = 512, 50


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network and its data."""
    torch.manual_seed(0)
    part = load_images("fashion_mnist").train
    X, t = part.X[:NUM_IMAGES].flatten(1), part.t[:NUM_IMAGES]
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), t).backward()
        optimizer.step()
    return net, X, t


def main() -> None:
    """Print iterations without and with a preconditioner."""
    net, X, t = trained()
    model, loss = ig.functional(net), nn.functional.cross_entropy
    y = model.parameters()
    G = gauss_newton(model, loss, y, X, t)
    b, _ = ig.tree.ravel(ig.tree.grad(lambda y: loss(model(y, X), t), y))
    rough: dict[str, LinearOperator] = {
        name: kfac(model, loss, y, X, t, corrected=corrected) for name, corrected in (("K-FAC", False), ("EKFAC", True))
    }
    print(f"{'damping':>8} {'CG':>6} " + " ".join(f"{name + ' x' + str(m):>10}" for name in rough for m in (1, 10)))
    for damping in DAMPINGS:
        A = G.damped(damping)
        bare = CG(rtol=1e-5).solve(A, b.detach()).num_iter
        counts = [
            CG(rtol=1e-5, preconditioner=P.damped(factor * damping).known_inverse).solve(A, b.detach()).num_iter
            for P in rough.values()
            for factor in (1, 10)
        ]
        print(f"{damping:8.0e} {bare:6d} " + " ".join(f"{count:10d}" for count in counts))


if __name__ == "__main__":
    main()
