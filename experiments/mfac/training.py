"""Data parts, epochs and accuracy, the same for every optimizer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments.dataset import Part
from experiments.images import Images


class Parts(NamedTuple):
    """Three disjoint parts of a data set."""

    train: Part
    validation: Part
    test: Part
    num_given: int  # pictures that train and validation are taken from


def split_images(images: Images, num_train: int, num_validation: int) -> Parts:
    """The first and the last pictures of the train part in an order drawn once and for all, and the whole test part.

    Raises:
        ValueError: there are not as many.
    """
    total = len(images.train.t)
    if num_train < 1 or num_validation < 1 or num_train + num_validation > total:
        raise ValueError(
            f"{images.name} has {total} pictures to train and validate with; got num_train={num_train} and"
            f" num_validation={num_validation}."
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    chosen = lambda rows: Part(images.train.X[rows], images.train.t[rows])
    return Parts(chosen(order[:num_train]), chosen(order[total - num_validation :]), images.test, total)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with initial weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@dataclass
class Trainer:
    """Epochs over a part, with a learning rate that falls to zero by a cosine over all of them.

    Args:
        network: trained in place.
        optimizer: of its parameters.
        part: what to train on.
        num_epochs: how many there will be.
        batch_size: examples in a step; the rest of an epoch that fills no batch is left out.
        seed: decides the order of examples.
        after_step: called after each step.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    part: Part
    num_epochs: int
    batch_size: int
    seed: int
    after_step: Callable[[], object] = lambda: None

    def epochs(self) -> Iterator[float]:
        """Trains an epoch at a time and yields its mean loss in nats.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        generator = torch.Generator().manual_seed(self.seed)
        num_batches = len(self.part.t) // self.batch_size
        schedule = CosineAnnealingLR(self.optimizer, self.num_epochs * num_batches)
        for epoch in range(self.num_epochs):
            self.network.train()
            order = torch.randperm(len(self.part.t), generator=generator)
            losses = []
            for rows in order[: num_batches * self.batch_size].view(num_batches, self.batch_size):
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.network(self.part.X[rows]), self.part.t[rows])
                loss.backward()
                self.optimizer.step()
                schedule.step()
                self.after_step()
                losses.append(loss.detach())
            mean = torch.stack(losses).mean().item()
            if not mean < float("inf"):
                raise FloatingPointError(f"the loss is {mean} in epoch {epoch + 1}; lower the learning rate.")
            yield mean


@torch.no_grad()
def accuracy(network: nn.Module, part: Part) -> float:
    """Share of right predictions in percent, batch normalisation and dropout as in use."""
    network.eval()
    hits = [(network(X).argmax(1) == t).sum() for X, t in zip(part.X.split(1000), part.t.split(1000), strict=True)]
    return 100 * int(sum(hits)) / len(part.t)


def gradient_rows(network: nn.Module, parameters: list[Tensor], part: Part, rows: Tensor) -> Tensor:
    """Gradients of the mean loss over batches as rows, `(m, n)`, as of the network in use.

    Args:
        network: not changed.
        parameters: those whose gradients make a row, n numbers in all.
        part: the examples.
        rows: indices of examples, `(m, batch)`.
    """
    network.eval()
    gradients = []
    for batch in rows:
        loss = F.cross_entropy(network(part.X[batch]), part.t[batch])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(gradients)
