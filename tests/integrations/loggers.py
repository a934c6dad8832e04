"""What a logger wrote, read back by the tools of its own project."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

Curves = dict[str, list[tuple[int, float]]]


def read_events(folder: Path) -> Curves:
    """Tag -> (step, value), of TensorBoard's event files."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_wandb(folder: Path) -> Curves:
    """Name -> (step, value), of the one offline run in a folder: a log of LevelDB's kind after a head of 7 bytes."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, record, curves = path.read_bytes(), 7, b"", Curves()
    while at + _HEAD.size <= len(data):
        if _BLOCK - at % _BLOCK < _HEAD.size:  # the rest of a block that no head fits into is not used
            at += _BLOCK - at % _BLOCK
        _, size, kind = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        record += data[at : at + size]
        at += size
        if kind in (_FULL, _LAST):
            _add(curves, record)
            record = b""
    return curves


_HEAD, _BLOCK, _FULL, _LAST = struct.Struct("<IHB"), 32768, 1, 4  # checksum, length, kind


def _add(curves: Curves, record: bytes) -> None:
    parsed: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    parsed.ParseFromString(record)
    row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item}
    for name, value in row.items():
        if isinstance(value, (int, float)) and not name.startswith("_"):
            curves.setdefault(name, []).append((row.get("trainer/global_step", row["_step"]), value))
