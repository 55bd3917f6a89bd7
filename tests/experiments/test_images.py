"""Image data sets are read as published; skipped where the files are not at hand."""

import gzip
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from experiments.images import data_folder, load_images

COUNTS = {"mnist": (60_000, 10_000), "fashion_mnist": (60_000, 10_000), "cifar10_subset": (10_000, 2_000)}


@pytest.mark.parametrize("name", COUNTS)
def test_pictures_and_labels_have_the_published_counts(name):
    if not (data_folder() / name).is_dir():
        pytest.skip(f"no {name} under {data_folder()}; set IMPLICITGRAD_DATA")
    images = load_images(name)
    assert (len(images.train.t), len(images.test.t)) == COUNTS[name]
    assert images.num_classes == 10
    assert images.train.X.shape[1:] == ((3, 32, 32) if name.startswith("cifar") else (1, 28, 28))
    assert images.train.X.mean((0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(images.train.X.std((0, 2, 3)), torch.ones(images.train.X.shape[1]), rtol=0, atol=1e-3)
    if name == "mnist":
        assert torch.bincount(images.train.t).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def _write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


def test_idx_files_are_read_number_by_number(tmp_path: Path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    pixels, labels = torch.randint(0, 256, (6, 4, 4)), torch.tensor([0, 1, 2, 2, 1, 0])
    for prefix in ("train", "t10k"):
        _write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels)
        _write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    images = load_images("mnist", str(tmp_path))
    scaled = pixels.float() / 255
    torch.testing.assert_close(images.test.X[:, 0], (scaled - scaled.mean()) / scaled.std())
    assert images.train.t.tolist() == labels.tolist() and images.num_classes == 3


def test_missing_files_say_where_they_were_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*arguments):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlretrieve", offline)
    for name in COUNTS:
        with pytest.raises(FileNotFoundError, match=f"{name}.*IMPLICITGRAD_DATA"):
            load_images(name, str(tmp_path))
    with pytest.raises(ValueError, match="no image data set 'imagenet'; there are mnist"):
        load_images("imagenet", str(tmp_path))
