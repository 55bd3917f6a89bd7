"""The `functorch` that ships inside torch: deprecated aliases of `torch.func`, still in use."""

import importlib
import warnings

import torch

import implicitgrad as ig


def test_bundled_functorch_differentiates_an_implicit_solution() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing and calling the aliases is deprecated
        functorch = importlib.import_module("functorch")

        cube_root = ig.implicit(ig.FixedPoint(lambda x, y: (2 * y + x / y**2) / 3))(lambda x: x ** (1 / 3))
        x = torch.tensor([8.0, 27.0], dtype=torch.float64)
        slope = functorch.vmap(functorch.grad(cube_root))(x)
    torch.testing.assert_close(slope, x ** (-2 / 3) / 3, rtol=1e-12, atol=0)
