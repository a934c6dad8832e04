"""CIFAR-10 in its usual forms: the two official archives, a folder of images, strips of images.

It is decoded into memory when it is loaded, which takes a few seconds; nothing is written to disk.

References:
    Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.zoo.data.dataset import Dataset
from pomona.zoo.data.files import VARIABLE, malformed

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py", "cifar10")
_TRAIN, _TEST = tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# Those of ImageNet: pretrained networks for CIFAR-10 often expect them, and to other networks it does not matter.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_Images = NDArray[np.uint8]  # [n, 32, 32, 3]
_Labels = NDArray[np.int64]  # [n]
_Split = tuple[_Images, _Labels]


def load_cifar10(data_dir: str | Path | None = None) -> Dataset:
    """Load CIFAR-10 from the given folder, or from the one that POMONA_DATA names.

    The folder itself, or cifar-10-batches-bin, cifar-10-batches-py or cifar10 in it, holds one of these:

    - the six files of the "binary version", ``data_batch_1.bin`` to ``_5.bin`` and ``test_batch.bin``;
    - the six of the "python version", without the suffix; no code in them is run;
    - ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or jpg, bmp, webp), the classes by name or by number;
    - strips of images one below the other, ``train_000.webp``, ``train_001.webp``, ... with ``train_labels.npy``, and
      the same with ``test``.

    The last two need Pillow. Pixels become ``(x / 255 - mean) / deviation`` with the means (0.485, 0.456, 0.406) and
    deviations (0.229, 0.224, 0.225). Training images are shifted by up to four pixels, black coming in at the border,
    and mirrored at random.

    Args:
        data_dir: the folder with CIFAR-10.
    """
    given_as, place = ("data_dir", data_dir) if data_dir is not None else (VARIABLE, os.environ.get(VARIABLE))
    if not place:
        raise FileNotFoundError(
            f"no CIFAR-10: name the folder that holds it (--data-dir, or the environment variable {VARIABLE})"
        )
    root = Path(place).expanduser().resolve()
    folder, read = _find(root, given_as=given_as)
    train, test = read(root / folder)
    counts = len(train[1]), len(test[1])
    sizes = "{:,} training and {:,} test images".format(*counts)
    title = f"CIFAR-10, {sizes}" if counts == (50_000, 10_000) else f"CIFAR-10 files with {sizes}"
    return Dataset(
        "cifar10",
        f"{title} ({Path(root.name, folder).as_posix()})",
        *_tensors(train),
        *_tensors(test),
        border=tuple(-mean / std for mean, std in zip(_MEAN, _STD, strict=True)),
    )


def _find(root: Path, *, given_as: str) -> tuple[str, Callable[[Path], tuple[_Split, _Split]]]:
    for folder in _FOLDERS:
        for form, read in _FORMS.items():
            if any((root / folder / name).exists() for name in form):
                return folder, read
    raise FileNotFoundError(
        f"no CIFAR-10 in {given_as}={str(root)!r}{'' if root.is_dir() else ', which is not a folder'}: it must hold"
        f" {_TRAIN[0]}.bin to {_TRAIN[-1]}.bin and {_TEST[0]}.bin (the binary version), the same without .bin (the"
        " python version), train/CLASS and test/CLASS with images, or train_000.webp, ... with train_labels.npy;"
        f" itself or in {', '.join(_FOLDERS[1:])}"
    )


def _tensors(split: _Split) -> tuple[Tensor, Tensor]:
    images, labels = split
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    return inputs.div_(255).sub_(mean).div_(std), torch.from_numpy(labels)


def _read_all(read: Callable[[Path], _Split], folder: Path, suffix: str) -> tuple[_Split, _Split]:
    names = [f"{name}{suffix}" for name in (*_TRAIN, *_TEST)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"CIFAR-10 in {folder} is not whole: missing {', '.join(missing)}; download it again")
    *train, test = (read(folder / name) for name in names)
    images, labels = zip(*train, strict=True)
    return (np.concatenate(images), np.concatenate(labels)), test


def _read_binary(folder: Path) -> tuple[_Split, _Split]:
    return _read_all(_read_records, folder, ".bin")


def _read_python(folder: Path) -> tuple[_Split, _Split]:
    return _read_all(_read_pickle, folder, "")


def _read_records(path: Path) -> _Split:
    """One byte for the label, then 3,072 for the image: all red, all green, all blue, row by row."""
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (1 + _PIXELS):
        raise malformed(path, f"a multiple of {1 + _PIXELS:,} bytes, a label and an image each", f"{len(content):,}")
    records = content.reshape(-1, 1 + _PIXELS)
    return _checked(path, records[:, 1:], records[:, 0])


class _Arrays(pickle.Unpickler):
    """Builds numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] == "numpy" and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):  # how later versions write bytes for earlier ones
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_pickle(path: Path) -> _Split:
    expected = "a batch of CIFAR-10's python version"
    try:
        batch = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # pickle documents no closed list
        raise malformed(path, expected, f"something else ({type(error).__name__}: {error})") from None
    pixels, labels = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
    is_pixels = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (_PIXELS,)
    if not is_pixels or not isinstance(labels, list) or not labels or len(labels) != len(batch[b"data"]):
        what = f"data of uint8 [n, {_PIXELS}] and as many labels"
        raise malformed(path, f"{expected}, {what}", "other content", "is this another data set?")
    assert isinstance(pixels, np.ndarray)
    return _checked(path, pixels, np.asarray(labels))


def _checked(path: Path, pixels: _Images, labels: NDArray[Any]) -> _Split:
    _check_labels(path, labels)
    return pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels.astype(np.int64)


def _check_labels(path: Path, labels: NDArray[Any]) -> None:
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise malformed(path, "labels in 0..9", found, "is this another data set?")


def _read_folder(folder: Path) -> tuple[_Split, _Split]:
    train, test = (_read_classes(folder / part) for part in ("train", "test"))
    return train, test


def _read_classes(folder: Path) -> _Split:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; images of CIFAR-10 belong in train/CLASS and test/CLASS")
    images, labels = [], []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        known = {**{name: index for index, name in enumerate(CLASSES)}, **{str(index): index for index in range(10)}}
        if place.name not in known:
            raise malformed(place, f"a class, one of {', '.join(CLASSES)} or 0..9", place.name, "rename the folder")
        for path in sorted(path for path in place.iterdir() if path.suffix.lower() in _IMAGES):
            images.append(_read_image(path, height=_SIDE))
            labels.append(known[place.name])
    if not images:
        raise malformed(folder, f"images ({', '.join(_IMAGES)}) in a folder for each class", "none")
    return np.stack(images), np.asarray(labels, np.int64)


def _read_strips(folder: Path) -> tuple[_Split, _Split]:
    train, test = (_read_strip(folder, part) for part in ("train", "test"))
    return train, test


def _read_strip(folder: Path, part: str) -> _Split:
    path = folder / f"{part}_labels.npy"
    strips = sorted(path for path in folder.glob(f"{part}_*.webp") if re.fullmatch(rf"{part}_\d+", path.stem))
    if not path.is_file() or not strips:
        missing = path.name if strips else f"{part}_000.webp"
        raise FileNotFoundError(f"CIFAR-10 in {folder} is not whole: missing {missing}")
    try:
        labels = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise malformed(path, "an array of labels", f"something else ({error})") from None
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise malformed(path, "a list of integers", f"{labels.dtype} {list(labels.shape)}", "is this another data set?")
    _check_labels(path, labels)
    images = np.concatenate([_read_image(strip).reshape(-1, _SIDE, _SIDE, 3) for strip in strips])
    if len(images) != len(labels):
        found = f"{len(images):,} in {len(strips)} strips"
        raise malformed(
            folder, f"{len(labels):,} images, one for each label in {path.name}", found, "is a strip missing?"
        )
    return images, labels.astype(np.int64)


def _read_image(path: Path, height: int | None = None) -> _Images:
    """An image of height x 32 x 3; without ``height`` any multiple of 32 is accepted."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow, which is not installed: `pip install pillow`") from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise malformed(path, "an image", f"something else ({error})") from None
    is_right = pixels.shape[0] == height if height else pixels.shape[0] % _SIDE == 0
    if not is_right or pixels.shape[1] != _SIDE:
        expected = f"{_SIDE} x {_SIDE} pixels" + ("" if height else ", or some of these one below the other")
        found = f"{pixels.shape[0]} x {pixels.shape[1]}"
        raise malformed(path, f"an image of {expected}", found, "is this another data set?")
    return pixels


_FORMS: dict[tuple[str, ...], Callable[[Path], tuple[_Split, _Split]]] = {  # keyed by files that show which form it is
    (f"{_TRAIN[0]}.bin", f"{_TEST[0]}.bin"): _read_binary,
    (_TRAIN[0], _TEST[0]): _read_python,
    ("train_labels.npy", "train_000.webp"): _read_strips,
    ("train", "test"): _read_folder,
}
