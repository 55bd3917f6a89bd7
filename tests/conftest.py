"""Every test in this folder runs in float64, from one seed, on one thread; folders below choose for themselves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def float64_and_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Restores what it sets but the seed; the random state of tests in other folders is left alone."""
    if Path(request.path).parent != Path(__file__).parent:
        yield
        return
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # tensors of a few numbers: handing them to threads costs more than the work
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)
