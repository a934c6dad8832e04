"""Shows the progress of a run: lines of a log, and on a terminal one live line below them."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_REFRESH_SECONDS = 0.2


class Progress:
    """Writes to ``stream``; the live line appears only if that is a terminal.

    Args:
        stream: default: standard output.
        quiet: write nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._is_live = not quiet and self._stream.isatty()
        self._shown_at = 0.0

    def line(self, text: str) -> None:
        """Write a line that stays."""
        if self._quiet:
            return
        self.clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    @property
    def is_due(self) -> bool:
        """Whether it is time to show the live line again; always False if there is none."""
        return self._is_live and time.monotonic() - self._shown_at > _REFRESH_SECONDS

    def status(self, text: str) -> None:
        """Replace the live line."""
        self.clear()
        self._stream.write(text[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
        self._shown_at = time.monotonic()

    def clear(self) -> None:
        """Remove the live line, before anything else writes to the terminal."""
        if self._is_live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def duration(seconds: float) -> str:
    """``4:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
