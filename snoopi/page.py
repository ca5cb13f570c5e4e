"""The parts of a self-contained HTML page: frame and style, sections, tables, facts, pictures.

Arguments named `content`, `rows` and `headers` are HTML already; every other text is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from snoopi.pictures import data_uri


def document(title: str, content: str) -> str:
    """A whole HTML document that loads nothing: its policy allows inline style and data: only."""
    return _PAGE.format(title=escape(title), style=_STYLE, content=content)


def section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def figure(title: str, image: Image.Image, caption: str, alt: str) -> str:
    """A titled picture, inside the page as a data: URI."""
    return (
        f'<figure><h3>{escape(title)}</h3><div class="picture">'
        f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></div></figure>'
    )


def details(title: str, content: str) -> str:
    """Content that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Headline figures: name, value, note."""
    parts = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        f'<dd class="note">{escape(note)}</dd></div>'
        for name, value, note in items
    ]
    return f'<dl class="tiles">{"".join(parts)}</dl>' if parts else ""


def facts(items: Iterable[tuple[str, str]]) -> str:
    """Names and values below one another."""
    parts = [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items]
    return f'<dl class="facts">{"".join(parts)}</dl>' if parts else ""


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str,
    note: str = "",
    *,
    last_is_total: bool = False,
) -> str:
    """A table under its title and a note; scrolls sideways where the page is narrow."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in headers)
    body = []
    for i, row in enumerate(rows):
        mark = ' class="total"' if last_is_total and i == len(rows) - 1 else ""
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        body.append(f'<tr{mark}><th scope="row">{row[0]}</th>{cells}</tr>')
    return (
        f'<div class="table"><p><strong>{escape(title)}</strong> {escape(note)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></div>"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{content}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --page: #f6f7f9; --panel: #fff; --ink: #1f2630; --muted: #596473; --rule: #d9dee5;
  --series-0: #0b66b5; --series-1: #b84a00; --series-2: #00785a; --series-3: #8440b8;
  --series-4: #8a6d00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1318; --panel: #181e26; --ink: #e4e8ee; --muted: #9aa6b5; --rule: #2e3743;
    --series-0: #5fb2f7; --series-1: #f29a5c; --series-2: #43c79c; --series-3: #c79cf2;
    --series-4: #d9c04a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 1rem; padding-bottom: .35rem;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .6rem; }
p { max-width: 46rem; margin: 0 0 1rem; }
.verdict { font-size: 1.12rem; max-width: 50rem; }
dl, dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px;
  margin-top: 1.6rem; }
.tiles div, figure, .table, details, .facts { background: var(--panel);
  border: 1px solid var(--rule); border-radius: 8px; }
.tiles div { padding: 14px 16px; }
.tiles dt { font-size: .85rem; color: var(--muted); }
.tiles dd { font-size: 1.55rem; white-space: nowrap; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tiles dd.note { font-size: .82rem; white-space: normal; font-weight: 400; line-height: 1.4;
  color: var(--muted); }
figure { margin: 0 0 16px; padding: 16px; overflow: hidden; }
.picture { display: flex; flex-wrap: wrap; gap: 12px 24px; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: .88rem; color: var(--muted); flex: 1 1 16rem;
  max-width: 40rem; }
figcaption:empty { display: none; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 16px; }
.plots figure { margin: 0; }
.plot { display: block; width: 100%; height: auto; }
.plot text { fill: var(--muted); font-size: 12px; text-anchor: middle; }
.plot .y { text-anchor: end; }
.plot .legend { text-anchor: start; fill: var(--ink); }
.plot .grid { stroke: var(--rule); }
.plot .axis { stroke: var(--muted); }
.series-0 { --colour: var(--series-0); } .series-1 { --colour: var(--series-1); }
.series-2 { --colour: var(--series-2); } .series-3 { --colour: var(--series-3); }
.series-4 { --colour: var(--series-4); }
.curve { fill: none; stroke: var(--colour); stroke-width: 2; stroke-linejoin: round; }
.reference { stroke: var(--colour); stroke-width: 1.5; }
.band { fill: var(--colour); opacity: .16; }
.mark { fill: var(--colour); }
.unseen { fill: transparent; }
.unseen:hover { fill: var(--colour); }
.empty { color: var(--muted); }
.table { margin: 0 0 16px; overflow: hidden; }
.table > p { margin: 0; padding: 12px 16px; max-width: none; font-size: .92rem;
  color: var(--muted); }
.table > p strong { color: var(--ink); margin-right: .5em; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--series-0); }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 16px; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--rule); }
th:first-child { text-align: left; }
thead th { font-weight: 600; font-size: .85rem; color: var(--muted); }
tbody th { font-weight: 500; }
.total th, .total td { font-weight: 650; border-top: 2px solid var(--muted); }
.interval { display: inline-flex; align-items: center; gap: 10px; }
.interval span { min-width: 7.5em; }
.bar { display: block; flex: none; }
.bar .scale { stroke: var(--rule); stroke-width: 2; }
.bar .interval { stroke: var(--series-0); stroke-width: 4; opacity: .5; stroke-linecap: round; }
.bar .value { fill: var(--series-0); }
.bar .before { fill: var(--panel); stroke: var(--muted); stroke-width: 1.5; }
.facts { padding: 8px 16px; margin-bottom: 16px; }
.facts div { display: grid; grid-template-columns: minmax(7rem, 12rem) 1fr; gap: 12px;
  padding: 5px 0; }
.facts dt { color: var(--muted); }
.facts dd { overflow-wrap: anywhere; }
details { margin-bottom: 16px; }
details > summary { padding: 12px 16px; cursor: pointer; font-weight: 600; }
details .table { border: 0; margin: 0; }
pre { margin: 0; padding: 0 16px 16px; overflow-x: auto; font-size: .85rem; line-height: 1.5; }
@media print { body { background: #fff; } figure, .table { break-inside: avoid; } }
"""
