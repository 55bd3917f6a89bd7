"""A projection as the last layer of a network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ProjectionLayer(nn.Module):
    """Projects every row of its input onto a convex set, as softmax does onto the simplex, but with exact zeros.

    `output = projection(row)` for each row of `(*batch, n)`; derivatives are those of the projection.

    Args:
        projection: Function of one point `(n,)`, for example `implicitgrad.projections.simplex` or
            `lambda y: projections.l2_ball(y, 2.0)`.

    Source: Martins and Astudillo (2016), "From softmax to sparsemax", for the simplex.

    Example:
        >>> from implicitgrad import projections
        >>> ProjectionLayer(projections.simplex)(torch.tensor([[0.5, 1.2, -3.0], [0.0, 0.0, 0.0]]))
        tensor([[0.1500, 0.8500, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """

    def __init__(self, projection: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(projection):
            raise TypeError(f"ProjectionLayer needs a function of one point, got {type(projection).__name__}")
        self.projection = projection

    def forward(self, inputs: Tensor) -> Tensor:
        """Every row of `(*batch, n)` projected."""
        if inputs.ndim == 1:
            return self.projection(inputs)
        rows = inputs.reshape(-1, inputs.shape[-1])
        return torch.func.vmap(self.projection)(rows).reshape(inputs.shape)
