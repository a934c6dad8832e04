"""Write the tables of operations that C, JavaScript and the documentation have, from the records in Python.

    python core/tables.py          # `make tables`
    python core/tables.py --check  # says which would change, and fails if one would

The records are those of ``src/pomona/runtime/operations.py`` and the attributes of ``node.py``. A table stands between
two lines that say so; ``core/src/operations.inc`` is one as a whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from pomona.runtime.node import ATTRIBUTES
from pomona.runtime.operations import DTYPES, MAX_DIMENSIONS, OPERATIONS, Operation

ROOT = Path(__file__).parent.parent
_BEGIN, _END = "made by `make tables`: begin", "made by `make tables`: end"


def header() -> str:
    """The numbers of ``pomona_net.h``."""
    operations = [f"  POMONA_{op.name.upper()} = {op.number}, /* {op.says} */" for op in OPERATIONS.values()]
    attributes = [f"  POMONA_ATTRIBUTE_{a.name.upper()} = {a.number}, /* {a.kind} */" for a in ATTRIBUTES.values()]
    dtypes = [f"  POMONA_{name.upper()} = {number}," for name, number in DTYPES.items()]
    return "\n".join(
        [
            "/* Operations. x is the first operand. */",
            "enum {",
            *operations,
            f"  POMONA_NUM_OPS = {_end(op.number for op in OPERATIONS.values())},",
            "};",
            "",
            "/* Attributes: integers, but for a number. A tensor is its index, or -1. */",
            "enum {",
            *attributes,
            f"  POMONA_NUM_ATTRIBUTES = {_end(a.number for a in ATTRIBUTES.values())},",
            "};",
            "",
            "/* What values are made of. */",
            "enum {",
            *dtypes,
            "};",
            "",
            f"#define POMONA_MAX_DIMENSIONS {MAX_DIMENSIONS}",
        ]
    )


def traits() -> str:
    """``operations.inc``."""
    return "\n".join(
        [
            f"// {_BEGIN}. See operations.h.",
            "",
            "// name, least and most operands, dtypes taken, attributes read, kind, unit, keeps zero, is in place",
            "#define POMONA_EACH_OPERATION(DO) \\",
            *_continued(map(_row, OPERATIONS.values())),
            "",
            "#define POMONA_EACH_ELEMENTWISE(DO) \\",
            *_continued(f"  DO({op.name.upper()})" for op in OPERATIONS.values() if op.kind == "elementwise"),
            "",
            "// name, field of Attributes",
            "#define POMONA_EACH_ATTRIBUTE(DO) \\",
            *_continued(f"  DO({a.name.upper()}, {a.name})" for a in ATTRIBUTES.values()),
            "",
            f"// {_END}",
            "",
        ]
    )


def _row(op: Operation) -> str:
    names = (*op.attributes, *(("kernel",) if op.weight == "kernel" else ()))
    attributes = sum(1 << ATTRIBUTES[name].number for name in names)
    takes = sum(1 << DTYPES[dtype] for dtype in op.takes)
    flags = f"{str(op.keeps_zero).lower()}, {str(op.is_in_place).lower()}"
    least, most = op.operands
    kind, unit = f"k{op.kind.capitalize()}", f"k{op.unit.capitalize()}"
    return f"  DO({op.name.upper()}, {least}, {most}, {takes:#x}, {attributes:#x}, {kind}, {unit}, {flags})"


def javascript() -> str:
    """The tables of ``web/pomona.js``."""
    operations = [
        f'  {op.name}: {{ number: {op.number}, weight: "{op.weight}", attributes: {_list(op.attributes)} }},'
        for op in OPERATIONS.values()
    ]
    attributes = [
        f'  {a.name}: {{ number: {a.number}, kind: "{a.kind}", least: {a.least} }},' for a in ATTRIBUTES.values()
    ]
    dtypes = [f"  {name}: {number}," for name, number in DTYPES.items()]
    return "\n".join(
        [
            "const OPERATIONS = {",
            *operations,
            "};",
            "const ATTRIBUTES = {",
            *attributes,
            "};",
            "const INPUT_DTYPES = {",
            *dtypes,
            "};",
            f"const DIMENSIONS = {MAX_DIMENSIONS};",
        ]
    )


def documentation() -> str:
    """The tables of ``docs/file-format.md``."""
    operations = [
        f"| `{op.name}` | {_operands(op)} | {', '.join(f'`{name}`' for name in op.attributes)} | {op.says} |"
        for op in OPERATIONS.values()
    ]
    attributes = [
        f"| `{a.name}` | {_KINDS[a.kind].format(a.least)} | {_default(a.default)} |" for a in ATTRIBUTES.values()
    ]
    return "\n".join(
        [
            "",
            "| operation | operands | attributes | yields |",
            "| --- | --- | --- | --- |",
            *operations,
            "",
            "| attribute | value | default |",
            "| --- | --- | --- |",
            *attributes,
            "",
        ]
    )


_KINDS = {
    "tensor": "name of a tensor",
    "integer": "integer, at least {}",
    "pair": "two integers, of height and width, each at least {}",
    "number": "number that float32 holds",
    "bool": "`true` or `false`",
}


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return "infinity" if value > 0 else "-infinity"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{str(value).lower()}`"


def _operands(op: Operation) -> str:
    least, most = op.operands
    return f"{least}" if least == most else f"{least} to {most}"


def _list(names: Iterable[str]) -> str:
    return f"[{', '.join(f'{chr(34)}{name}{chr(34)}' for name in names)}]"


def _continued(lines: Iterable[str]) -> list[str]:
    """Lines of one macro."""
    *first, last = lines
    return [*(f"{line} \\" for line in first), last]


def _end(numbers: Iterable[int]) -> int:
    return max(numbers) + 1


def files() -> dict[Path, str]:
    """Every file with a table, as it must be."""
    found = {ROOT / "core/src/operations.inc": traits()}
    for name, table in {
        "core/include/pomona_net.h": header(),
        "web/pomona.js": javascript(),
        "docs/file-format.md": documentation(),
    }.items():
        found[ROOT / name] = _filled((ROOT / name).read_text(encoding="utf-8"), table)
    return found


def _filled(text: str, table: str) -> str:
    """The text with this table between the lines that mark its place."""
    lines = text.split("\n")
    begin, end = (next(i for i, line in enumerate(lines) if mark in line) for mark in (_BEGIN, _END))
    return "\n".join([*lines[: begin + 1], *table.split("\n"), *lines[end:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in files()}
    changed = {path: text for path, text in files().items() if text != old[path]}
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if not check:
            path.write_text(text, encoding="utf-8")
    sys.exit(check and bool(changed))


if __name__ == "__main__":
    main()
