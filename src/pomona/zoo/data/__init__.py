"""What the zoo learns: images of digits (MNIST), photographs (CIFAR-10), and a text, by characters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pomona.zoo.data.cifar import load_cifar10
from pomona.zoo.data.dataset import Dataset
from pomona.zoo.data.mnist import load_mnist
from pomona.zoo.data.text import load_shakespeare

__all__ = ["DATA", "Dataset", "load_cifar10", "load_mnist", "load_shakespeare"]

DATA: dict[str, Callable[[str | Path | None], Dataset]] = {
    "mnist": load_mnist,
    "shakespeare": load_shakespeare,
    "cifar10": load_cifar10,
}
"""Name in a recipe -> the function that loads it from a folder; None stands for the folder that POMONA_DATA names."""
