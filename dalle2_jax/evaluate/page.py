"""One self-contained HTML page of a report: tables, intervals, and the measured pictures.

Pictures are inlined as PNG, plots are SVG, and there is no script, so the page can be mailed and opened
offline. Untrusted texts (captions, names) are escaped.
"""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence

from etils import epath

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
td.number { text-align: right } img { max-width: 100%; image-rendering: pixelated }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto } summary { cursor: pointer }
"""


def table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """An HTML table; numbers have four significant digits and are right-aligned."""

    def cell(value) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return f"<td{' class=number' if number else ''}>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def picture(png: bytes, caption: str = "") -> str:
    """A PNG, inlined."""
    data = base64.b64encode(png).decode("ascii")
    text = html.escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"></figure>\n'


def intervals(shares: Mapping[str, tuple[float, Sequence[float]]]) -> str:
    """An SVG of shares in 0 .. 1, name -> (value, (low, high)): a dot and its interval for each."""
    left, width, row = 220, 420, 24
    height = row * len(shares) + 30
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 40}" height="{height}">']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * width
        parts.append(f'<path d="M{x} 0V{height - 22}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{height - 6}" font-size="11" text-anchor="middle">{tick:g}</text>')
    for i, (name, (value, (low, high))) in enumerate(shares.items()):
        y, (a, b, c) = row * i + row / 2, (left + share * width for share in (low, high, value))
        parts.append(
            f'<text x="{left - 10}" y="{y + 4}" font-size="13" text-anchor="end">{html.escape(name)}</text>'
        )
        parts.append(f'<path d="M{a:.1f} {y}H{b:.1f}" stroke="#246" stroke-width="2"/>')
        parts.append(f'<circle cx="{c:.1f}" cy="{y}" r="4" fill="#246"/>')
    return "".join(parts) + "</svg>\n"


def entries(results: Mapping[str, Mapping]) -> str:
    """The table of entries of picture metrics, and the plot of the shares among them."""
    columns = ("", "value", "95 %", "N", "reference", "N", "features", "preset", "what")
    rows = []
    for name, entry in results.items():
        low_high = entry["interval"] and "{:.4g} .. {:.4g}".format(*entry["interval"])
        reference, by = entry.get("reference"), entry.get("reference_by")
        against = f"{reference} ({by})" if by else reference, entry.get("n_reference")
        described = (entry["features"], entry.get("preset"), entry["what"])
        rows.append((name, entry["value"], low_high, entry["n"], *against, *described))
    shares = {
        name: (entry["value"], entry["interval"]) for name, entry in results.items() if entry.get("share")
    }
    return table(columns, rows) + (intervals(shares) if shares else "")


def write(
    path: str | os.PathLike,
    title: str,
    numbers: str,
    text: str,
    pictures: Sequence[os.PathLike],
    report: Mapping,
) -> None:
    """Write the page.

    Args:
      numbers: HTML of this module, such as a `table`; '' for none. text: the numbers as lines.
      pictures: PNG files to show. report: JSON values, shown in a collapsed section at the end.
    """
    sections = [("Numbers", numbers)] if numbers else []
    sections.append(("As text", f"<pre>{html.escape(text)}</pre>\n"))
    for file in map(epath.Path, pictures):
        sections.append((file.stem.replace("_", " "), picture(file.read_bytes(), file.stem)))
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections)
    everything = html.escape(json.dumps(report, indent=2, ensure_ascii=False))
    epath.Path(path).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{body}"
        f"<h2>Everything</h2>\n<details><summary>JSON</summary><pre>{everything}</pre></details>\n</body></html>\n"
    )
