"""Image data sets: MNIST and Fashion-MNIST as IDX files, CIFAR-10 as a zip of PNGs.

Files are looked for under ``data_dir/<name>/``: the setting `data_dir`, else the environment variable
IMPLICITGRAD_DATA, else ``~/.cache/implicitgrad``, where missing files of the first two are downloaded to.
"""

import gzip
import os
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.dataset import Part

Name = Literal["mnist", "fashion_mnist", "cifar10_subset"]

_SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
_CIFAR_FILE = "cifar10_png_12k.zip"


@dataclass(frozen=True)
class Images:
    """Pictures `(n, channels, height, width)` in float32, shifted and scaled per channel by the train part."""

    name: str
    num_classes: int
    train: Part
    test: Part


def load_images(name: Name, data_dir: str | None = None) -> Images:
    """A data set by name, standardised.

    Raises:
        ValueError: no such data set.
        FileNotFoundError: it is not there and could not be downloaded; says where it was looked for.
    """
    if name not in (*_SOURCES, "cifar10_subset"):
        raise ValueError(f"no image data set {name!r}; there are {', '.join([*_SOURCES, 'cifar10_subset'])}")
    folder = data_folder(data_dir) / name
    read = _read_cifar if name == "cifar10_subset" else _read_idx_part
    train, test = (read(folder, part) for part in ("train", "test"))
    mean = train.X.mean((0, 2, 3), keepdim=True)
    scale = train.X.std((0, 2, 3), keepdim=True)
    standardised = [Part((part.X - mean) / scale, part.t) for part in (train, test)]
    return Images(name, int(train.t.max()) + 1, *standardised)


def data_folder(data_dir: str | None = None) -> Path:
    """The folder that holds data sets, one subfolder each."""
    return Path(data_dir or os.environ.get("IMPLICITGRAD_DATA") or Path.home() / ".cache" / "implicitgrad")


def _read_idx_part(folder: Path, part: str) -> Part:
    prefix = "train" if part == "train" else "t10k"
    pixels = _idx(folder, f"{prefix}-images-idx3-ubyte.gz").unsqueeze(1).float() / 255
    return Part(pixels, _idx(folder, f"{prefix}-labels-idx1-ubyte.gz").long())


def _idx(folder: Path, file: str) -> Tensor:
    """An array of bytes: three bytes, the number of dimensions, each as four bytes, then the numbers."""
    path = folder / file
    if not path.exists():
        _download(path)
    raw = gzip.decompress(path.read_bytes())
    num_dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims).reshape(shape).copy())


def _download(path: Path) -> None:
    address = _SOURCES[path.parent.name]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    try:
        urllib.request.urlretrieve(address + path.name, partial)
    except OSError as error:
        raise FileNotFoundError(
            f"{path} is not there and could not be fetched from {address}: {error}. Set data_dir or IMPLICITGRAD_DATA "
            f"to a folder with {path.parent.name}/{path.name}."
        ) from None
    partial.replace(path)


def _read_cifar(folder: Path, part: str) -> Part:
    path = folder / _CIFAR_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there. It holds {{train,test}}/<class>/<name>.png, 32 x 32 RGB; set data_dir or "
            f"IMPLICITGRAD_DATA to the folder above {folder.name}/."
        )
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{part}/") and name.endswith(".png"))
        pixels = np.stack([np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names])
    classes = sorted({name.split("/")[1] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    return Part(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels)
