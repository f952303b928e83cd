"""What commands print: tables, durations, counts that have a bound. With rich, if it is there, on a
terminal; else as plain text."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from spark_outbox.management.arguments import UNITS

Cells = Sequence[object]


def table(header: Sequence[str], rows: Iterable[Cells]) -> str:
    """Return columns of plain text; numbers are set to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_number = [is_numeric(column[1:]) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )


def print_table(stream: Any, header: Sequence[str], rows: Iterable[Cells]) -> None:
    """Print a table on a command's stream."""
    rows = list(rows)
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        stream.write(table(header, rows))
        return
    if not stream.isatty():
        stream.write(table(header, rows))
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = zip(*([str(cell) for cell in row] for row in rows), strict=True) if rows else ()
    numeric = [is_numeric(column) for column in columns] or [False] * len(header)
    for name, right in zip(header, numeric, strict=True):
        shown.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(str(cell) for cell in row))
    Console(file=stream._out, markup=False, highlight=False).print(shown)


def is_numeric(cells: Iterable[str]) -> bool:
    """Return whether all are numbers, ages or durations, or empty."""
    return all(re.fullmatch(r"[\d,.]*[smhdw%]?", cell) for cell in cells)


def as_duration(value: float) -> str:
    """Return seconds as `duration` reads them, in the largest unit that divides them."""
    for unit in ("d", "h", "m"):
        if value >= UNITS[unit] and value % UNITS[unit] == 0:
            return f"{value / UNITS[unit]:,.0f}{unit}"
    return f"{value:,.0f}s"


def as_age(seconds: float | None) -> str:
    """Return roughly how long ago something was."""
    if seconds is None:
        return ""
    for unit in ("d", "h", "m"):
        if seconds >= 2 * UNITS[unit]:
            return f"{seconds / UNITS[unit]:,.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def as_time(text: str | None) -> str:
    """Return a time of PostgreSQL's JSON to the second."""
    if text is None:
        return ""
    moment, _, rest = text.partition(".")
    zone = rest.lstrip("0123456789") if rest else ""
    return moment.replace("T", " ") + zone


def bounded(count: int, bound: int) -> str:
    """Return a count that was given up beyond `bound`."""
    return f"{count:,}" if count <= bound else f"over {bound:,}"
