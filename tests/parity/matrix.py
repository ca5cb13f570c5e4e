"""The parity matrix: architectures by file layouts, with the worst error of each, printed at the
end of `make parity`."""

from __future__ import annotations

RECORDS: dict[tuple[str, str], float] = {}


def record(architecture: str, layout: str, error: float) -> None:
    """Note a case's relative error (0: bit-equal); the worst one of a case stays."""
    key = (architecture, layout)
    RECORDS[key] = max(error, RECORDS.get(key, 0.0))


def lines() -> list[str]:
    """Layouts down, architectures across; '.' where a layout does not exist for an architecture.

    Architectures that share no layout with others (samplers have none) get a table of their own.
    """
    tables: list[list[str]] = []
    for architecture in dict.fromkeys(name for name, _ in RECORDS):
        layouts = _layouts([architecture])
        near = [table for table in tables if layouts & _layouts(table)]
        tables = [table for table in tables if table not in near]
        tables.append([name for table in near for name in table] + [architecture])
    return [line for table in tables for line in (*_table(table), "")]


def _layouts(architectures: list[str]) -> set[str]:
    return {layout for name, layout in RECORDS if name in architectures}


def _table(columns: list[str]) -> list[str]:
    rows = list(dict.fromkeys(layout for name, layout in RECORDS if name in columns))
    if len(rows) == 1:
        return [f"{name:24s} {rows[0]}: {_cell(name, rows[0])}" for name in columns]
    width = max(map(len, rows))
    table = [" " * width + "".join(f"  {name:>13}" for name in columns)]
    return table + [
        row.ljust(width) + "".join(f"  {_cell(name, row):>13}" for name in columns) for row in rows
    ]


def _cell(architecture: str, layout: str) -> str:
    error = RECORDS.get((architecture, layout))
    return "." if error is None else "equal" if error == 0 else f"{error:.1e}"
