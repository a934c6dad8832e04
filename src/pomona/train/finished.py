"""Read a run back from its folder: what is known of it, and once it has finished, its network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomona.train.checkpoint import Checkpoints
from pomona.train.folder import FolderError
from pomona.zoo.data import DATA, Dataset
from pomona.zoo.models import Model, build_model

_RESUME = "run the same command again to resume it"
_REWRITE = "run the same command again to write them again"


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """The network that a run left, and what is known of the run.

    Attributes:
        folder: where it lies.
        facts: at least title, source, seed, recipe and data; after pruning all of ``result.json``.
        weights: the state dict, on the CPU.
        checksum: checksum of the data it was trained on; None if the folder no longer has ``run.json``.
    """

    folder: Path
    facts: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    checksum: str | None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe in plain values; for a dense network without its method."""
        recipe: dict[str, Any] = self.facts["recipe"]
        return recipe

    def make_model(self) -> Model:
        """The trained network.

        Raises:
            ValueError: the weights in the folder are not those of the recipe's model.
        """
        model = build_model(self.recipe["model"], seed=0)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError:
            name = self.recipe["model"]
            raise ValueError(f"the weights in {self.folder} are not those of a {name}; {_REWRITE}") from None
        return model

    def load_data(self, data_dir: str | Path | None = None) -> Dataset:
        """The recipe's data, with the test set that the run was tested on.

        Args:
            data_dir: the folder of the data; default: the one that POMONA_DATA names.
        """
        data = DATA[self.recipe["data"]](data_dir)
        return data.hold_out(self.recipe["validation"]) if self.recipe.get("validation") else data


def open_finished(folder: Path) -> FinishedRun:
    """Open a run that has finished, or a dense network that other runs start from.

    Raises:
        FolderError: the folder holds no run, or one that cannot be read.
        ValueError: the run has not finished, or its weights cannot be read.
    """
    manifest = _manifest(folder)
    if manifest.get("command") == "base":
        return _open_base(folder, manifest)
    facts = read_run(folder)
    path = folder / "model.pt"
    if not path.exists():
        raise ValueError(f"{folder} holds no model.pt: the run has not finished; {_RESUME}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no closed list
        raise ValueError(f"{path} cannot be read ({type(error).__name__}); {_REWRITE}") from None
    return FinishedRun(folder, facts, weights, manifest.get("checksum"))


def _open_base(folder: Path, manifest: Mapping[str, Any]) -> FinishedRun:
    """A dense network has no result of its own, only a last checkpoint."""
    found = Checkpoints(folder).load()
    if found is None or found[0]["phase"] != 1:
        raise ValueError(f"the dense network in {folder} has not finished; {_RESUME}")
    recipe, memory = manifest["recipe"], found[0]["memory"]
    facts = {
        "title": f"dense {recipe['model']}",
        "source": None,
        "seed": recipe["seed"],
        "commit": ", ".join(filter(None, memory["commits"])) or None,
        "threads": manifest["threads"],
        "data": manifest["data"],
        "recipe": recipe,
    }
    return FinishedRun(folder, facts, memory["model"], manifest["checksum"])


def _manifest(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``; empty without one, since ``result.json`` and ``model.pt`` are enough."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "run.json").read_text())
        return manifest
    except (OSError, ValueError):
        return {}


def read_run(folder: Path) -> dict[str, Any]:
    """What is known of the run in a folder: its result, or before it has finished its recipe and data.

    Raises:
        FolderError: the folder holds no run, one that cannot be read, or a dense network, which has no result.
    """
    try:
        finished = folder / "result.json"
        if finished.exists():
            result: dict[str, Any] = json.loads(finished.read_text())
            return result | title_of(result["recipe"], result["data"])
        manifest = json.loads((folder / "run.json").read_text())
        if manifest["command"] == "base":
            raise FolderError(f"{folder} holds a dense network for other runs to start from, which has no report")
        return title_of(manifest["recipe"], manifest["data"])
    except FileNotFoundError:
        raise FolderError(f"{folder} holds no run of pomona (there is no run.json in it)") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FolderError(f"the run in {folder} cannot be read: {error!r}") from None


def title_of(recipe: Mapping[str, Any], data: str) -> dict[str, Any]:
    """What is known of a run before it has finished."""
    known = {key: recipe[key] for key in ("title", "source", "seed")}
    return {**known, "recipe": dict(recipe), "data": data}
