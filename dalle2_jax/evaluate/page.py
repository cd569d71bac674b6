"""One self-contained HTML page of a report: headline figures, tables, intervals, the measured pictures.

Pictures are inlined as PNG, plots are SVG, and there is no script, so the page can be mailed and opened
offline. Untrusted texts (captions, names) are escaped.
"""

import base64
import dataclasses
import html
import json
import os
from collections.abc import Mapping, Sequence

from etils import epath

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
td.number { text-align: right } img, svg { max-width: 100%; height: auto } figure { margin: 0 }
img.pixels { image-rendering: pixelated } .about { color: #666 } summary { cursor: pointer }
.figures { display: flex; flex-wrap: wrap; gap: 1em } .figures div { background: #f2f5f9; padding: .6em 1em }
.figures b { display: block; font-size: 1.7em; line-height: 1.3 } .figures small { color: #666 }
pre { background: #f5f5f5; padding: 1em; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px }
"""
HEADLINES = 8  # numbers in large print, the first of them


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a report: what it is, its value, its 95 % interval, and whether it is a share in 0 .. 1."""

    name: str
    value: float
    interval: Sequence[float] | None = None
    share: bool = False

    def text(self) -> str:
        """The value with four digits, a share in percent."""
        return f"{100 * self.value:.1f} %" if self.share else f"{self.value:.4g}"

    def spread(self) -> str:
        """The interval, '' for none."""
        if self.interval is None:
            return ""
        scale, unit = (100, " %") if self.share else (1, "")
        low, high = (f"{scale * bound:.4g}" for bound in self.interval)
        return f"{low} .. {high}{unit}"


def figures(name: str, value) -> list[Figure]:
    """The numbers of a metric's JSON values: entries, shares by kind, or plain fractions."""
    if isinstance(value, float):
        return [Figure(name, value, share=0 <= value <= 1)]
    if not isinstance(value, Mapping):
        return []
    for key in ("value", "share", "named", "legal"):
        if isinstance(value.get(key), float):
            interval = value.get("interval")
            interval = interval.get(key) if isinstance(interval, Mapping) else interval
            is_share = key != "value" or bool(value.get("share"))
            return [Figure(f"{name}, all named" if key == "named" else name, value[key], interval, is_share)]
    return [figure for key, inner in value.items() for figure in figures(f"{name}: {_words(key)}", inner)]


def _words(name: str) -> str:
    return name.replace("_", " ")


def headlines(found: Sequence[Figure]) -> str:
    """The first figures in large print."""
    cells = [
        f"<div>{html.escape(figure.name)}<b>{figure.text()}</b><small>{figure.spread()}</small></div>"
        for figure in found[:HEADLINES]
    ]
    return f'<div class="figures">{"".join(cells)}</div>\n'


def of_figures(found: Sequence[Figure]) -> str:
    """All figures as a table, and the plot of the shares among them."""
    rows = [(figure.name, figure.text(), figure.spread()) for figure in found]
    shares = {f.name: (f.value, f.interval) for f in found if f.share and f.interval is not None}
    return table(("", "value", "95 %"), rows) + (intervals(shares) if shares else "")


def table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """An HTML table; numbers have four significant digits and are right-aligned."""

    def cell(value) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return f"<td{' class=number' if number else ''}>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def picture(png: bytes, caption: str = "", pixels: bool = True) -> str:
    """A PNG, inlined; pixels: enlarge it without smoothing."""
    data = base64.b64encode(png).decode("ascii")
    text = html.escape(caption, quote=True)
    how = ' class="pixels"' if pixels else ""
    return f'<figure><img{how} alt="{text}" src="data:image/png;base64,{data}"></figure>\n'


def intervals(shares: Mapping[str, tuple[float, Sequence[float]]]) -> str:
    """An SVG of shares in 0 .. 1, name -> (value, (low, high)): a dot and its interval for each."""
    left, width, row = max(220, 8 * max(map(len, shares))), 420, 24
    height, across = row * len(shares) + 30, left + width + 40
    size = f'width="{across}" height="{height}" viewBox="0 0 {across} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>']
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
    found: Sequence[Figure] = (),
    about: str = "",
) -> None:
    """Write the page.

    Args:
      numbers: HTML of this module, such as a `table`; '' for none. text: the numbers as lines.
      pictures: PNG files to show. report: JSON values, shown in a collapsed section at the end.
      found: the first of them come first, in large print. about: a line under the title.
    """
    sections = [("Numbers", numbers)] if numbers else []
    sections.append(("As text", f"<pre>{html.escape(text)}</pre>\n"))
    for file in map(epath.Path, pictures):
        grid = picture(file.read_bytes(), file.stem, pixels=file.stem != "comparison")
        sections.append((_words(file.stem), grid))
    everything = json.dumps(report, indent=2, ensure_ascii=False)
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections)
    body += f"<details><summary>Everything as JSON</summary><pre>{html.escape(everything)}</pre></details>\n"
    top = f'<p class="about">{html.escape(about)}</p>\n' if about else ""
    top += headlines(found) if found else ""
    epath.Path(path).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{top}{body}</body></html>\n"
    )
