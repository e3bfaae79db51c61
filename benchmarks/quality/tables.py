"""Tables in Markdown, and how numbers look in them."""

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], Any]]  # what to show of a row, by the column's name


def place(environment: Row) -> str:
    """The machine of a result: its GPU, or its processor and cores."""
    return str(environment.get("gpu", {}).get("name") or f"{environment['processor']}, {environment['cores']} cores")


def table(columns: Columns, rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    body = ([show(row) for show in columns.values()] for row in rows)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (columns, ["---"] * len(columns), *body))


def shown(name: Any) -> Callable[[Row], str]:
    """A number of the row; nothing where the row has none."""
    return lambda row: number(row.get(name))


def rungs(row: Row) -> str:
    return " ".join(map(str, row.get("rungs", [])))


def times(row: Row) -> str:
    """Milliseconds a token; nothing where none was timed."""
    return f"{row['p50_ms']:.2f} ({row['p20_ms']:.2f} to {row['p80_ms']:.2f})" if "p50_ms" in row else ""


def interval(row: Row) -> str:
    """A difference and its interval."""
    return f"{row['delta']:+.4f} ({row['delta_low']:+.4f} to {row['delta_high']:+.4f})"


def number(value: float | None) -> str:
    """Four significant digits, large numbers and whole ones in full; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
