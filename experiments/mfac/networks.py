"""Two small image classifiers."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers between `sizes`, ReLU in between; pictures are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resnet(widths: Sequence[int], num_channels: int, num_classes: int) -> nn.Sequential:
    """A convolution, one residual block per width, the mean over the picture, a linear layer.

    The first convolution and every block but the first halve the resolution.

    Source: He et al. (2016), Deep residual learning, with batch normalisation and projections where the width changes.
    """
    blocks = [
        _Block(inputs, outputs, stride=1 if place == 0 else 2)
        for place, (inputs, outputs) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
    ]
    first = nn.Conv2d(num_channels, widths[0], 3, stride=2, padding=1, bias=False)
    stem = [first, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = (
            nn.Identity()
            if (inputs, stride) == (outputs, 1)
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.skip(x))
