"""Real processes that talk over gloo. A world is started once; its ranks then wait for functions to run together."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0  # seconds that one function may take


class World:
    """Ranks 0, 1, ... in processes of their own, until ``close()``."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["tests.distributed.checks"]
        )  # torch takes seconds to import: once for all ranks
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._pipes = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function, of a module, returns on each rank; an exception on one of them is raised here."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} of {self.size} did not answer: {function.__name__}{args}")
            answers.append(pipe.recv())
        failed = [f"rank {rank}: {text}" for rank, (is_good, text) in enumerate(answers) if not is_good]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, folder: str, pipe: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    ignore_what_torch_warns_of()
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=Path(folder, "store").as_uri())
    while (asked := pipe.recv()) is not None:
        function, args = asked
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc(limit=-6)))
    dist.destroy_process_group()


def ignore_what_torch_warns_of() -> None:
    """Warnings of torch.distributed about its own ways, which no user of it can avoid."""
    warnings.filterwarnings("ignore", ".* starves layers")  # of networks this small
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # a layer's output; harmless
    warnings.filterwarnings("ignore", "torch.distributed is disabled, .* single process")  # as no_dist=True asks for
    warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")  # of torch 2.6 on CPUs
