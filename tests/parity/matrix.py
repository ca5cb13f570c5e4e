"""The parity matrix: architectures by file layouts, with the worst error of each, printed at the
end of `make parity`."""

from __future__ import annotations

RECORDS: dict[tuple[str, str], float] = {}


def record(architecture: str, layout: str, error: float) -> None:
    """Note a case's relative error (0: bit-equal); the worst one of a case stays."""
    key = (architecture, layout)
    RECORDS[key] = max(error, RECORDS.get(key, 0.0))


def lines() -> list[str]:
    """The table; '.' where a layout does not exist for an architecture."""
    rows = list(dict.fromkeys(row for row, _ in RECORDS))
    columns = list(dict.fromkeys(column for _, column in RECORDS))
    width = max(map(len, rows))
    table = [" " * width + "".join(f"  {column:>12}" for column in columns)]
    for row in rows:
        cells = [RECORDS.get((row, column)) for column in columns]
        texts = ["." if c is None else "equal" if c == 0 else f"{c:.1e}" for c in cells]
        table.append(row.ljust(width) + "".join(f"  {text:>12}" for text in texts))
    return table
