"""Plain text: tables, and lists that stay short."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def few(names: Collection[str], num: int = 3) -> str:
    """The first ``num`` names, and how many more there are.

    Example:
        >>> few(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - num} more" if len(names) > num else ""
    return ", ".join(list(names)[:num]) + more


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Rows in aligned columns, two spaces between them, one line per row.

    Args:
        rows: the cells of each row; all rows have the same number of cells.
        right: columns that align to the right, counted from 0; the others align to the left.

    Example:
        >>> print(table([["layer", "weights"], ["fc1", "235,200"], ["fc2", "30,000"]], right=[1]))
        layer  weights
        fc1    235,200
        fc2     30,000
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
