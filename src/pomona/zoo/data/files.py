"""Find the files of a data set, and read them."""

from __future__ import annotations

import gzip
import lzma
import zlib
from pathlib import Path

_SUFFIXES = ("", ".gz", ".xz")

VARIABLE = "POMONA_DATA"  # the environment variable that names the folder of the data


def existing(folder: Path, name: str) -> Path | None:
    """The file of this name, plain or compressed; None if there is none."""
    return next((path for suffix in _SUFFIXES if (path := folder / (name + suffix)).is_file()), None)


def decompressed(path: Path) -> bytes:
    """The content of a file, decompressed if it is compressed."""
    # By content and not by suffix: some browsers decompress a .gz file and keep its name.
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            return gzip.decompress(content)
        if content.startswith(b"\xfd7zXZ\x00"):
            return lzma.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise malformed(path, "a whole compressed file", f"a truncated or damaged one ({error})") from None
    return content


def malformed(path: Path, expected: str, found: str, way_out: str = "download it again") -> ValueError:
    """The error for a file that is not what it should be."""
    return ValueError(f"{path}: expected {expected}, found {found}; {way_out}")
