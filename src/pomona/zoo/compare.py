"""Methods side by side: every recipe at every compression with every seed, from shared dense networks.

Each run is a process of its own (``pomona train``), so that a comparison uses all cores, goes on where it was when it
is started again, and one run that fails does not end the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from pomona.zoo.checkpoint import write_atomically
from pomona.zoo.pictures import draw_comparison
from pomona.zoo.progress import Progress, duration
from pomona.zoo.recipe import Recipe, RecipeError, load_recipe
from pomona.zoo.run import FolderError

_BASE = ("model", "data", "batch_size", "seed", "validation", "precision", "base")  # what a dense network depends on
_STOPPED = 130  # exit status of a run that was asked to stop


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        recipe: its file or name.
        overrides: ``key=value`` each.
        folder: where it goes.
        base: folder of the dense network that it starts from, if its recipe has one.
    """

    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    base: Path | None

    def command(self, data_dir: str | None, threads: int) -> list[str]:
        """What a user would type."""
        words = [sys.executable, "-m", "pomona", "train", self.recipe, "--no-pictures"]
        words += ["--threads", str(threads), "--out", str(self.folder)]
        for override in self.overrides:
            words += ["--set", override]
        return [
            *words,
            *(["--base", str(self.base)] if self.base else []),
            *(["--data-dir", str(Path(data_dir).resolve())] if data_dir else []),
        ]


def plan(
    recipes: Sequence[str], compressions: Sequence[float], seeds: Sequence[int], overrides: Sequence[str], out: Path
) -> list[Job]:
    """All runs, compression by compression, so that a comparison that was cut short compares equals.

    Raises:
        RecipeError: a recipe cannot be read, or the recipes differ in model, data, validation or total epochs.
    """
    jobs = []
    for seed in seeds:
        for compression in compressions:
            for name in recipes:
                changes = (*overrides, f"method.compression={compression:g}", f"seed={seed}")
                recipe = load_recipe(name, changes)
                folder = out / f"{Path(name).stem}-{compression:g}x-seed{seed}"
                jobs.append(Job(name, changes, folder, out / f"base-{base_key(recipe)}" if recipe.base else None))
    check_equal_cost({name: load_recipe(name, overrides) for name in recipes})
    return jobs


def base_key(recipe: Recipe) -> str:
    """Equal for recipes whose dense networks are equal."""
    told = recipe.to_dict()
    text = json.dumps([told[key] for key in _BASE], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-seed{recipe.seed}"


def check_equal_cost(recipes: dict[str, Recipe]) -> None:
    """Refuse recipes that a table would put side by side although one was given more."""
    for what in ("model", "data", "validation", "epochs", "scope"):
        values = {name: getattr(recipe, what) for name, recipe in recipes.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in values.items())
            total = " in all stages together" if what == "epochs" else ""
            raise RecipeError(f"recipes that are compared must have the same {what}{total}; {told}")


def run_jobs(
    jobs: Sequence[Job], *, data_dir: str | None, threads: int, at_once: int, progress: Progress
) -> dict[Path, str]:
    """Run all that has no result yet; the dense networks first, each once.

    Returns:
        folder -> what went wrong, for those that failed; their output is in ``logs`` beside their folders.

    Raises:
        KeyboardInterrupt: after every run under way has saved where it is.
    """
    failed: dict[Path, str] = {}
    started, stop = time.monotonic(), Event()
    running: set[subprocess.Popen[bytes]] = set()

    def execute(job: Job) -> None:
        if stop.is_set():
            return
        log = job.folder.parent / "logs" / f"{job.folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                job.command(data_dir, threads),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # so that Ctrl-C reaches it once, through us
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
            job_of = {pool.submit(execute, job): job for job in some}
            try:
                for num_done, future in enumerate(as_completed(job_of), start=1):
                    future.result()
                    if stop.is_set():
                        raise KeyboardInterrupt
                    job = job_of[future]
                    ahead = (time.monotonic() - started) / num_done * (len(some) - num_done)
                    told = f"FAILED, {failed[job.folder]}" if job.folder in failed else _outcome(job.folder)
                    progress.line(f"{num_done}/{len(some)}, {duration(ahead)} left: {job.folder.name}: {told}")
            except KeyboardInterrupt:
                stop.set()
                for process in list(running):
                    process.send_signal(signal.SIGTERM)  # each saves a checkpoint and ends
                raise

    left = [job for job in jobs if not _is_done(job)]
    first_of = {job.base: job for job in reversed(left) if job.base}  # these train the dense networks of the others
    first = list(first_of.values())
    run_all(first)
    started = time.monotonic()
    run_all([job for job in left if job not in first])
    return failed


def _is_done(job: Job) -> bool:
    if not (job.folder / "result.json").exists():
        return False
    there = json.loads((job.folder / "run.json").read_text())["recipe"]
    here = json.loads(json.dumps(load_recipe(job.recipe, job.overrides).to_dict()))
    if there != here:
        key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        raise FolderError(
            f"{job.folder} belongs to another run: {key} is {there.get(key)!r} there and {here.get(key)!r} here. Name "
            f"another folder with --out, or delete it"
        )
    return True


def _outcome(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    return f"{result['accuracy']['final']:.2f} at {result['report']['compression']:.1f}x"


def collect(out: Path) -> list[dict[str, Any]]:
    """What the finished runs in ``out`` came to, one entry each; ``name`` is that of the recipe."""
    found = []
    for path in sorted(out.glob("*/result.json")):
        result = json.loads(path.read_text())
        name, _, rest = path.parent.name.rpartition("x-seed")[0].rpartition("-")
        recipe = result["recipe"]
        stages = [recipe[key]["epochs"] for key in ("base", "prune", "retrain") if recipe.get(key)]
        found.append(
            {
                "name": name,
                "asked": float(rest),
                "seed": result["seed"],
                "compression": result["report"]["compression"],
                "nonzero": result["report"]["nonzero"],
                "base": result["accuracy"]["base"],
                "before_cut": result["accuracy"]["before_cut"],
                "accuracy": result["accuracy"]["final"],
                "epochs": sum(stages),
                "model": recipe["model"],
                "seconds": result["seconds"],
                "commit": result["commit"],
                "data": result["data"],
                "method": result["method"],
            }
        )
    return found


def tabulate(entries: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown: a row for each recipe, a column for each compression, best mean first."""
    compressions = sorted({entry["asked"] for entry in entries})
    names = list(dict.fromkeys(entry["name"] for entry in entries))

    def cell(name: str, compression: float) -> list[float]:
        return [e["accuracy"] for e in entries if e["name"] == name and e["asked"] == compression]

    def worth(name: str) -> float:
        return statistics.mean([statistics.mean(cell(name, c)) if cell(name, c) else 0.0 for c in compressions])

    head = ["method", *(f"{c:g}x" for c in compressions), "seconds a run"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for name in sorted(names, key=worth, reverse=True):
        cells = [spread(cell(name, c)) for c in compressions]
        seconds = statistics.median(e["seconds"] for e in entries if e["name"] == name)
        lines.append(f"| {' | '.join([name, *cells, f'{seconds:.0f}'])} |")
    return "\n".join(lines)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean, sample standard deviation and number of seeds."""
    known = list(values)
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f} (1)"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f} ({len(known)})"


def conclude(out: Path) -> str:
    """Write ``compare.json``, ``compare.md`` and ``compare.png`` of all finished runs in ``out``; returns the table."""
    entries = collect(out)
    if not entries:
        raise ValueError(f"no run in {out} has finished; see {out / 'logs'}")
    text = _caption(entries) + "\n\n" + tabulate(entries) + "\n"
    write_atomically(out / "compare.json", json.dumps(entries, indent=1).encode())
    write_atomically(out / "compare.md", text.encode())
    draw_comparison(entries, out / "compare.png", caption=_caption(entries))
    return text


def _caption(entries: Sequence[dict[str, Any]]) -> str:
    def told(key: str) -> str:
        return ", ".join(sorted({str(entry[key]) for entry in entries}))

    return f"{told('model')} on {told('data')}; {told('epochs')} epochs in all; final accuracy, mean ± sd (seeds)"
