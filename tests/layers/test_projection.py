"""A projection applied row by row, with the derivative of each row."""

import pytest
import torch

from implicitgrad import projections
from implicitgrad.layers import ProjectionLayer


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_rows_are_projected_one_by_one(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = ProjectionLayer(projections.simplex)(inputs)
    for row, got in zip(inputs.reshape(-1, 5), output.reshape(-1, 5), strict=True):
        torch.testing.assert_close(got, projections.simplex(row))
    assert output.shape == inputs.shape


def test_gradients_reach_the_network_and_equal_differences() -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    layer = ProjectionLayer(lambda y: projections.l2_ball(y, 0.5))
    assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True)
    linear = torch.nn.Linear(6, 4, dtype=torch.float64)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)  # to the centre of the simplex, where its derivative is I - 1/4
    torch.nn.Sequential(linear, ProjectionLayer(projections.simplex))(inputs)[:, 0].sum().backward()
    centred = torch.eye(4, dtype=torch.float64)[0] - 0.25
    torch.testing.assert_close(linear.weight.grad, torch.outer(centred, inputs.detach().sum(0)))


def test_something_else_than_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match="a function of one point, got float"):
        ProjectionLayer(1.0)  # pyright: ignore[reportArgumentType]
