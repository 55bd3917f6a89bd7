"""Listen to the products that somebody makes with an operator."""

import torch
from torch import Tensor

from implicitgrad.linalg.matrix import Product
from implicitgrad.linalg.operator import LinearOperator


class Recorder:
    """An operator like A that keeps its first products as pairs ``(v, A v)``.

    The way to learn from a solver without changing it: hand it `operator` in place of A.

    Args:
        A: a symmetric operator.
        num_pairs: how many pairs to keep, one per right-hand side of a block; they need two vectors each.

    Attributes:
        operator: stands for A.

    Example:
        >>> recorder = Recorder(LinearOperator.from_dense(2 * torch.eye(3), symmetric=True), num_pairs=1)
        >>> _ = recorder.operator @ torch.ones(5, 3)
        >>> recorder.pairs()
        (tensor([[1., 1., 1.]]), tensor([[2., 2., 2.]]))
    """

    def __init__(self, A: LinearOperator, num_pairs: int):
        self._kept: list[tuple[Tensor, Tensor]] = []
        product = _recorded(A, self._kept, num_pairs)
        self.operator = LinearOperator(
            product,
            A.size,
            matmat=product,
            noise=A.noise,
            symmetric=A.symmetric,
            definite=A.definite,
            eigenvalue_floor=A.eigenvalue_floor,
            dtype=A.dtype,
            device=A.device,
            batch_shape=A.batch_shape,
        )

    @property
    def nbytes(self) -> int:
        """Memory of the pairs."""
        return sum(vectors.nbytes + images.nbytes for vectors, images in self._kept)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The vectors v and the images A v, both ``(m, *batch_shape, n)``; ValueError if there are none."""
        if not self._kept:
            raise ValueError("no pairs were recorded; make products with recorder.operator first.")
        vectors, images = zip(*self._kept, strict=True)
        return torch.cat(vectors), torch.cat(images)


def _recorded(A: LinearOperator, kept: list[tuple[Tensor, Tensor]], room: int) -> Product:
    """``v -> A v``, the first of which go to `kept`; it knows no recorder, which would make a reference cycle."""

    def product(v: Tensor) -> Tensor:
        nonlocal room
        image = A @ v
        if room > 0:
            rows, images = (v.unsqueeze(0), image.unsqueeze(0)) if v.shape == A.vector_shape else (v, image)
            # clones: solvers reuse the memory of v, and an image may be v itself
            kept.append((rows[:room].detach().clone(), images[:room].detach().clone()))
            room -= len(kept[-1][0])
        return image

    return product
