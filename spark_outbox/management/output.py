"""What commands print: tables, durations, counts that have a bound."""

from collections.abc import Iterable, Sequence

from spark_outbox.management.arguments import UNITS


def as_duration(value: float) -> str:
    """Return seconds as `duration` reads them, in the largest unit that divides them."""
    for unit in ("d", "h", "m"):
        if value >= UNITS[unit] and value % UNITS[unit] == 0:
            return f"{value / UNITS[unit]:,.0f}{unit}"
    return f"{value:,.0f}s"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return columns of text; numbers are set to the right."""
    lines = [header, *rows]
    widths = [max(len(str(line[place])) for line in lines) for place in range(len(header))]
    is_number = [
        all(isinstance(row[place], int | float) for row in lines[1:]) for place in range(len(header))
    ]
    return "\n".join(
        "  ".join(
            str(cell).rjust(width) if right else str(cell).ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )


def bounded(count: int, bound: int) -> str:
    """Return a count that was given up beyond `bound`."""
    return f"{count:,}" if count <= bound else f"over {bound:,}"
