"""A text, read by characters."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pomona.zoo.data.dataset import Dataset
from pomona.zoo.data.files import VARIABLE, decompressed, existing, malformed

_TEXT = "input.txt"
_TEXT_FOLDERS = ("", "tinyshakespeare")
_SHAKESPEARE = (
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of the 1,115,394 bytes of char-rnn's file
)
CONTEXT = 128  # characters in a window
VOCABULARY = 65  # different characters in tiny Shakespeare


def load_shakespeare(data_dir: str | Path | None = None) -> Dataset:
    """Load a text, ``input.txt``, from the given folder, or from the one that POMONA_DATA names.

    The file is in the folder itself or in tinyshakespeare, plain or compressed (.gz, .xz). The first 90 % are the
    training set, the rest is the test set. Each is cut into windows of 128 characters; an incomplete last window is
    dropped. A character is represented by its index in the sorted list of bytes that occur in the text.

    Args:
        data_dir: the folder with the text.
    """
    given_as, place = ("data_dir", data_dir) if data_dir is not None else ("POMONA_DATA", os.environ.get(VARIABLE))
    if not place:
        raise FileNotFoundError(
            f"no text: name the folder that holds {_TEXT} (--data-dir, or the environment variable {VARIABLE});"
            " use the tiny Shakespeare of char-rnn, or another long text"
        )
    root = Path(place).expanduser().resolve()
    folder = next((folder for folder in _TEXT_FOLDERS if existing(root / folder, _TEXT)), None)
    if folder is None:
        raise FileNotFoundError(
            f"no text in {given_as}={str(root)!r}{'' if root.is_dir() else ', which is not a folder'}:"
            f" missing {_TEXT} (plain, .gz or .xz; itself or in {', '.join(_TEXT_FOLDERS[1:])})"
        )
    path = existing(root / folder, _TEXT)
    assert path is not None
    return _read_text(path, Path(root.name, folder).as_posix())


def _read_text(path: Path, place: str) -> Dataset:
    content = np.frombuffer(decompressed(path), np.uint8)
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
