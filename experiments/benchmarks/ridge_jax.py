"""The JAXopt side of `ridge_hypergradient`: a process of its own, fed with a problem file and told when to run.

Arguments: the arrays of the problem for timing and of the one for second derivatives, as two `.npz` files. It writes
one line of JSON with the derivatives, then, for each line `k` of its input, one with the seconds of k runs per method.
"""

import json
import sys
import time
from collections.abc import Callable

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import jaxopt  # pyright: ignore[reportMissingImports]
import numpy as np
from jaxopt import linear_solve  # pyright: ignore[reportMissingImports]

jax.config.update("jax_enable_x64", True)

Arrays = dict[str, jax.Array]

SOLVERS: dict[str, Callable] = {
    "JAXopt jitted, default (normal CG, 1e-5)": linear_solve.solve_normal_cg,
    "JAXopt jitted, CG(1e-10)": lambda matvec, b: linear_solve.solve_cg(matvec, b, tol=1e-10),
    "JAXopt jitted, Cholesky": linear_solve.solve_cholesky,
}


def loss(y: jax.Array, x: jax.Array, data: Arrays) -> jax.Array:
    residual = data["features"] @ y - data["targets"]
    return (jnp.sum(residual**2) + jnp.sum(jnp.exp(x) * y**2)) / 2


def upper(y: jax.Array, data: Arrays) -> jax.Array:
    return jnp.mean((data["validation_features"] @ y - data["validation_targets"]) ** 2) / 2


def value(inner: Callable, solve: Callable) -> Callable:
    """`(x, y, data) -> upper loss` at the inner solution that `inner` makes of `(y, x, data)`."""
    solution = jaxopt.implicit_diff.custom_root(jax.grad(loss), solve=solve)(inner)
    return lambda x, y, data: upper(solution(y, x, data), data)


def closed_form(y: jax.Array, x: jax.Array, data: Arrays) -> jax.Array:
    features = data["features"]
    return jnp.linalg.solve(features.T @ features + jnp.diag(jnp.exp(x)), features.T @ data["targets"])


def load(path: str) -> Arrays:
    return {name: jnp.asarray(array) for name, array in np.load(path).items()}


def send(message: object) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    data, small = load(sys.argv[1]), load(sys.argv[2])
    x, y = data["x"], data["y"]
    gradients = {name: jax.jit(jax.grad(value(lambda y, x, data: y, solve))) for name, solve in SOLVERS.items()}
    second = jax.jacrev(jax.jacrev(value(closed_form, linear_solve.solve_normal_cg)))
    send(
        {
            "version": f"jax {jax.__version__}",
            "gradients": {name: run(x, y, data).tolist() for name, run in gradients.items()},
            "hessian": second(small["x"], small["y"], small).tolist(),
        }
    )
    for line in sys.stdin:
        seconds: dict[str, list[float]] = {name: [] for name in gradients}
        for _ in range(int(line)):
            for name, run in gradients.items():
                start = time.perf_counter()
                run(x, y, data).block_until_ready()
                seconds[name].append(time.perf_counter() - start)
        send(seconds)


if __name__ == "__main__":
    main()
