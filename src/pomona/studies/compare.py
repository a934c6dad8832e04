"""Methods side by side: every recipe at every compression with every seed, from shared dense networks.

Each run is a separate process (``pomona train``). A comparison thus uses all cores, resumes when it is started again,
and continues if one run fails.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

import torch

from pomona.pages.pictures import draw_comparison, times
from pomona.train.checkpoint import write_atomically
from pomona.train.folder import FolderError, base_of, differences
from pomona.train.progress import Progress, duration
from pomona.train.recipe import Recipe, load_recipe, recipe_from_dict
from pomona.train.stage import RecipeError
from pomona.zoo.models import MODELS, build_model

_STOPPED = 130  # exit status of a run that was asked to stop
_FOLDER = re.compile(r"(?P<name>.+)-(?P<asked>[^-]+)x-seed(?P<seed>\d+)")  # name of a run's folder
_PLUS_MINUS = "\u00b1"


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        recipe: file or name of its recipe.
        overrides: ``key=value`` each.
        folder: its folder.
        base: folder of the dense network that it starts from, if its recipe has one.
        start: file of the dense network that it starts from, instead of what its recipe says.
    """

    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    base: Path | None
    start: Path | None = None

    def read_recipe(self) -> Recipe:
        """The recipe with the changes of this run."""
        recipe = load_recipe(self.recipe, self.overrides)
        return replace(recipe, base=None) if self.start else recipe

    def command(self, data_dir: str | None, threads: int, *, device: str = "cpu", compiled: bool = False) -> list[str]:
        """The command that a user would type."""
        words = [sys.executable, "-m", "pomona", "train", self.recipe, "--no-pictures"]
        words += ["--threads", str(threads), "--out", str(self.folder)]
        for override in self.overrides:
            words += ["--set", override]
        return [
            *words,
            *(["--base", str(self.base)] if self.base else []),
            *(["--start", str(self.start.resolve())] if self.start else []),
            *(["--device", device] if device != "cpu" else []),
            *(["--compile"] if compiled else []),
            *(["--data-dir", str(Path(data_dir).resolve())] if data_dir else []),
        ]


def plan(
    recipes: Sequence[str],
    compressions: Sequence[float],
    seeds: Sequence[int],
    overrides: Sequence[str],
    out: Path,
    *,
    start: Path | None = None,
    dense: str | None = None,
    narrow: bool = False,
) -> list[Job]:
    """All runs, ordered by compression, so that a comparison that was stopped early still compares equals.

    Args:
        recipes: files or names.
        compressions: each recipe runs at each of them.
        seeds: each recipe runs with each of them.
        overrides: ``key=value`` each, for all recipes.
        out: folder of all runs.
        start: file with the dense network that all runs start from, instead of that of their recipes.
        dense: a recipe to run at compression 1.
        narrow: also run ``dense`` with narrower models, for each compression with the one nearest in weights.

    Raises:
        RecipeError: a recipe cannot be read, two runs would share a folder, or there is no narrower model.
    """
    if narrow and (start or not dense):
        raise RecipeError(
            "--narrow runs the recipe of --dense on narrower networks: it needs --dense, and excludes --start"
        )
    for override in overrides:
        if override.partition("=")[0].strip() in ("seed", "method.compression", "method.sparsity"):
            raise RecipeError(f"--set {override}: seed and compression differ from run to run; leave it out")
    jobs: dict[Path, Job] = {}

    def add(name: str, suffix: str, asked: float, compression: float, seed: int, *more: str) -> None:
        changes = (*overrides, *more, f"method.compression={compression:g}", f"seed={seed}")
        recipe = load_recipe(name, changes)
        folder = out / f"{Path(name).stem}{suffix}-{asked:g}x-seed{seed}"
        if folder in jobs:
            raise RecipeError(
                f"two runs would share the folder {folder}; name each recipe, compression and "
                f"seed only once, and give recipe files different names"
            )
        base = out / f"base-{base_key(recipe)}" if recipe.base and not start else None
        jobs[folder] = Job(name, changes, folder, base, start)

    for seed in seeds:
        if dense:
            add(dense, "", 1, 1, seed)
        for compression in compressions:
            for name in recipes:
                add(name, "", compression, compression, seed)
            if dense and narrow:
                model = narrower(load_recipe(dense, overrides), compression)
                add(dense, "-narrow", compression, 1, seed, f"model={model}")
    return list(jobs.values())


def narrower(recipe: Recipe, compression: float) -> str:
    """The zoo's narrower form of the recipe's model with the number of weights nearest to the pruned model's."""
    names = [name for name in MODELS if _family(name) == recipe.model != name]
    if not names:
        known = ", ".join(dict.fromkeys(_family(name) for name in MODELS if _family(name) != name))
        raise RecipeError(f"--narrow: the zoo has no narrower form of {recipe.model}, only of {known}")
    wanted = math.log(num_weights(recipe, recipe.model) / compression)
    return min(names, key=lambda name: abs(math.log(num_weights(recipe, name)) - wanted))


def num_weights(recipe: Recipe, model: str) -> int:
    """The number of a model's weights in the recipe's scope."""
    return sum(p.numel() for p in recipe.make_scope().select(build_model(model, seed=0)).inside.values())


def _family(model: str) -> str:
    """The model of which this one is a narrower form, or itself."""
    return re.sub(r"-w\d+$", "", model)


def base_key(recipe: Recipe) -> str:
    """A key that is equal for recipes with the same dense network."""
    text = json.dumps(base_of(recipe), sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-seed{recipe.seed}"


def check_equal_cost(jobs: Sequence[Job], out: Path) -> None:
    """Check that all runs of a table, including finished ones in ``out``, were given the same.

    Raises:
        RecipeError: they differ in model, data, validation, scope or total epochs.
    """
    recipes = {job.folder.name: job.read_recipe() for job in jobs}
    for folder, result in _finished(out):
        recipes.setdefault(folder.string, recipe_from_dict(result["recipe"]))
    for what in ("model", "data", "validation", "epochs", "scope"):
        name_of: dict[str, str] = {}
        for name, recipe in recipes.items():
            value = _family(recipe.model) if what == "model" else getattr(recipe, what)
            name_of.setdefault(json.dumps(value, sort_keys=True), name)
        if len(name_of) > 1:
            values = ", ".join(f"{value} in {name}" for value, name in name_of.items())
            total = " in all stages together" if what == "epochs" else ""
            raise RecipeError(f"runs that are compared must have the same {what}{total}, got {values}")


def run_jobs(
    jobs: Sequence[Job],
    *,
    data_dir: str | None,
    threads: int,
    at_once: int,
    progress: Progress,
    devices: Sequence[str] = ("cpu",),
    compiled: bool = False,
) -> dict[Path, str]:
    """Do all runs that have no result yet, the dense networks first. Parallel runs take turns on the devices.

    Returns:
        folder -> what went wrong, for runs that failed; their output is in ``logs`` next to their folders.

    Raises:
        KeyboardInterrupt: after every active run has saved its state.
    """
    failed: dict[Path, str] = {}
    started, stop = time.monotonic(), Event()
    running: set[subprocess.Popen[bytes]] = set()
    starting = Lock()  # so that a stop comes either before a start or after it, and then reaches the process
    free: SimpleQueue[str] = SimpleQueue()
    for device in islice(cycle(devices), at_once):
        free.put(device)

    def execute(job: Job) -> None:
        device = free.get()
        try:
            execute_on(device, job)
        finally:
            free.put(device)

    def execute_on(device: str, job: Job) -> None:
        log = job.folder.parent / "logs" / f"{job.folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with starting, log.open("ab") as file:
            if stop.is_set():
                return
            process = subprocess.Popen(
                job.command(data_dir, threads, device=device, compiled=compiled),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # so that Ctrl-C reaches it only once, through this process
            )
            running.add(process)
        status = process.wait()
        running.discard(process)
        if status == _STOPPED:
            stop.set()
        elif status:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            failed[job.folder] = f"exit status {status}: {''.join(last)}"

    def run_all(some: Sequence[Job]) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            try:
                job_of = {pool.submit(execute, job): job for job in some}
                for num_done, future in enumerate(as_completed(job_of), start=1):
                    future.result()
                    if stop.is_set():
                        raise KeyboardInterrupt
                    job = job_of[future]
                    ahead = (time.monotonic() - started) / num_done * (len(some) - num_done)
                    outcome = f"FAILED, {failed[job.folder]}" if job.folder in failed else _outcome(job.folder)
                    progress.line(f"{num_done}/{len(some)}, {duration(ahead)} left: {job.folder.name}: {outcome}")
            except KeyboardInterrupt:
                with starting:
                    stop.set()
                    for process in list(running):
                        process.send_signal(signal.SIGTERM)  # each one saves a checkpoint and ends
                raise

    left = [job for job in jobs if not _is_done(job)]
    first_of = {job.base: job for job in reversed(left) if job.base}  # these train the dense networks of the others
    first = list(first_of.values())
    run_all(first)
    started = time.monotonic()
    run_all([job for job in left if job not in first])
    return failed


def _is_done(job: Job) -> bool:
    if not all((job.folder / name).exists() for name in ("result.json", "model.pt")):  # written in this order
        return False
    manifest = json.loads((job.folder / "run.json").read_text())
    different = differences(manifest["recipe"], job.read_recipe().to_dict())
    begun, begins = (manifest.get("base") or {}).get("name"), job.start or job.base
    if not different and begun != (begins and begins.name):
        different = f"it started from {begun} there and starts from {begins and begins.name} here"
    if different:
        raise FolderError(
            f"{job.folder} belongs to another run: {different}. Name another folder with --out, or delete it"
        )
    return True


def _outcome(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    return f"{result['accuracy']['final']:.2f} at {times(result['report']['total'], result['report']['nonzero'])}"


def _finished(out: Path) -> Iterator[tuple[re.Match[str], dict[str, Any]]]:
    for path in sorted(out.glob("*/result.json")):
        folder = _FOLDER.fullmatch(path.parent.name)
        if folder and (path.parent / "model.pt").exists():
            yield folder, json.loads(path.read_text())


def collect(out: Path) -> list[dict[str, Any]]:
    """The results of the finished runs in ``out``, one entry per run; ``name`` is the name of the recipe.

    Zeros are counted in the weight files.

    Raises:
        ValueError: a file does not have as many zeros as its run reported.
    """
    found = []
    for folder, result in _finished(out):
        recipe = recipe_from_dict(result["recipe"])
        report, path = result["report"], out / folder.string / "model.pt"
        weights = torch.load(path, map_location="cpu", weights_only=True)
        nonzero = sum(int(weights[layer["name"]].count_nonzero()) for layer in report["layers"])
        if nonzero != report["nonzero"]:
            raise ValueError(f"{path} has {nonzero:,} non-zero weights, but its run ended with {report['nonzero']:,}")
        reached = report["compression"]
        if _family(recipe.model) != recipe.model and reached is not None:
            reached *= num_weights(recipe, _family(recipe.model)) / report["total"]
        found.append(
            {
                "name": folder["name"],
                "asked": float(folder["asked"]),
                "seed": result["seed"],
                "compression": reached,
                "nonzero": nonzero,
                "base": result["accuracy"]["base"],
                "before_cut": result["accuracy"]["before_cut"],
                "accuracy": result["accuracy"]["final"],
                "epochs": recipe.epochs,
                "model": recipe.model,
                "seconds": result["seconds"],
                "commit": result["commit"],
                "data": result["data"],
                "method": result["method"],
            }
        )
    return found


def tabulate(entries: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown: one row per recipe, one column per compression, best mean first.

    If a run did not reach the requested compression, the cell names the lowest one reached.
    """
    compressions = sorted({entry["asked"] for entry in entries})
    names = list(dict.fromkeys(entry["name"] for entry in entries))

    def accuracies(name: str, compression: float) -> list[float]:
        return [e["accuracy"] for e in entries if (e["name"], e["asked"]) == (name, compression)]

    def worth(name: str) -> float:
        return statistics.mean([statistics.mean(accuracies(name, c) or [0.0]) for c in compressions])

    def cell(name: str, compression: float) -> str:
        reached = [e["compression"] for e in entries if (e["name"], e["asked"]) == (name, compression)]
        short = [c for c in reached if falls_short(c, compression)]
        return spread(accuracies(name, compression)) + (f" at {min(short):.3g}x" if short else "")

    head = ["method", *(f"{c:g}x" for c in compressions), "seconds per run"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for name in sorted(names, key=worth, reverse=True):
        seconds = statistics.median(e["seconds"] for e in entries if e["name"] == name)
        lines.append(f"| {' | '.join([name, *(cell(name, c) for c in compressions), f'{seconds:.0f}'])} |")
    return "\n".join(lines)


def falls_short(reached: float | None, asked: float) -> bool:
    """Whether a run has clearly more weights left than requested; ``reached`` is None if none is left."""
    return reached is not None and reached < 0.99 * asked


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean, sample standard deviation and number of seeds."""
    known = list(values)
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f} (1)"
    return f"{statistics.mean(known):.{digits}f} {_PLUS_MINUS} {statistics.stdev(known):.{digits}f} ({len(known)})"


def conclude(out: Path) -> str:
    """Write ``compare.json``, ``compare.md`` and ``compare.png`` for the runs in ``out``; returns the table."""
    entries = collect(out)
    if not entries:
        raise ValueError(f"no run in {out} has finished; see {out / 'logs'}")
    text = _caption(entries) + "\n\n" + tabulate(entries) + "\n"
    write_atomically(out / "compare.json", json.dumps(entries, indent=1).encode())
    write_atomically(out / "compare.md", text.encode())
    draw_comparison(entries, out / "compare.png", caption=_caption(entries))
    return text


def _caption(entries: Sequence[dict[str, Any]]) -> str:
    def values(key: str) -> str:
        return ", ".join(sorted({str(entry[key]) for entry in entries}))

    what = f"{values('model')} on {values('data')}; {values('epochs')} epochs in all"
    return f"{what}; final accuracy, mean {_PLUS_MINUS} sd (seeds)"
