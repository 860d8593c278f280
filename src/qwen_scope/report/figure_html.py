"""Figures and tables as one HTML page that needs nothing else: drawings are SVG, there is no script."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qwen_scope.errors import printable

from .figures import Curves, Figure, Heatmap, Line, Points
from .markup import Markup, element
from .table import cell_text

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 60, 14, 170, 44
# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b", "#8c6d00")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 2rem;font-size:.85rem}td,th{padding:.15rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}th{border-bottom:1px solid #999}svg{max-width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:#222}.note{border-left:4px solid #d55e00;padding-left:.8rem}"""

Rows = Sequence[Sequence[str | int | float | None]]


def figure_page(
    title: str,
    tables: Sequence[tuple[str, Sequence[str], Rows]] = (),
    figures: Sequence[Figure] = (),
    notes: Sequence[str] = (),
) -> str:
    """A page with notes, tables (title, columns, rows) and figures; whatever the text holds is shown, never run."""
    body = [element("h1", title), *(element("p", note, class_="note") for note in notes)]
    for heading, columns, rows in tables:
        head = element("tr", *(element("th", name) for name in columns))
        lines = [element("tr", *(element("td", cell_text(cell).plain) for cell in row)) for row in rows]
        body += [element("h2", heading), element("table", head, *lines)]
    for figure in figures:
        body += [element("h2", figure.title), draw(figure)]
    head = element("head", element("meta", charset="utf-8"), element("title", title), element("style", Markup(STYLE)))
    page = f"<!doctype html>\n{element('html', head, element('body', *body), lang='en')}\n"
    return printable(page, keep="\n\t")


def draw(figure: Figure) -> Markup:
    """One figure as SVG."""
    if isinstance(figure, Heatmap):
        return heatmap(figure)
    return plot(figure)


def plot(figure: Curves | Points) -> Markup:
    """Axes with curves or points; a pointer over a mark shows its numbers."""
    lines = figure.lines if isinstance(figure, Curves) else [Line("", figure.x, figure.y)]
    log = isinstance(figure, Curves) and figure.log_x
    xs = [math.log10(x) if log else x for line in lines for x in line.x]
    ys = [y for line in lines for some in (line.y, line.low or (), line.high or ()) for y in some]
    (x0, x1), (y0, y1) = span(xs, isinstance(figure, Points)), span(ys, isinstance(figure, Points))

    def at(x: float, y: float) -> tuple[float, float]:
        x = math.log10(x) if log else x
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(
            HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP), 1
        )

    parts = axes(x0, x1, y0, y1, log, at)
    parts.append(label(figure.x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle"))
    parts.append(label(figure.y_label, 4, TOP, "start"))
    if isinstance(figure, Curves):
        for i, line in enumerate(lines):
            parts += curve(line, COLOURS[i % len(COLOURS)], "" if i < len(COLOURS) else "5 3", at)
            parts.append(label(line.name, WIDTH - RIGHT + 26, TOP + 12 + 15 * i, "start"))
            y = TOP + 8 + 15 * i
            colour, dash = COLOURS[i % len(COLOURS)], "" if i < len(COLOURS) else "5 3"
            x = WIDTH - RIGHT
            parts.append(
                element("line", x1=x + 6, x2=x + 22, y1=y, y2=y, stroke=colour, stroke_width=2, stroke_dasharray=dash)
            )
        height = max(HEIGHT, TOP + 20 + 15 * len(lines))
    else:
        height = HEIGHT
        for name, x, y in zip(figure.names, figure.x, figure.y, strict=True):
            cx, cy = at(x, y)
            shown = element("title", f"{name}: {x:.4g}, {y:.4g}")
            parts.append(element("circle", shown, cx=cx, cy=cy, r=4, fill=COLOURS[0]))
            parts.append(label(name, cx + 6, cy - 4, "start"))
    said = {"role": "img", "aria_label": figure.title}
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", width=WIDTH, **said)


def span(values: Sequence[float], room: bool) -> tuple[float, float]:
    """The ends of an axis."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    more = (high - low or abs(high) or 1.0) * (0.08 if room or high == low else 0.0)
    return low - more, high + more


def axes(x0: float, x1: float, y0: float, y1: float, log: bool, at) -> list[Markup]:
    """Grid lines with their numbers."""
    parts = []
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        real = 10**x if log else x
        px, py = at(real, y)
        left, bottom = at(10**x0 if log else x0, y0)
        parts.append(element("line", x1=px, x2=px, y1=TOP, y2=bottom, stroke="#ddd"))
        parts.append(element("line", x1=left, x2=WIDTH - RIGHT, y1=py, y2=py, stroke="#ddd"))
        parts.append(label(f"{real:.3g}", px, bottom + 16, "middle"))
        parts.append(label(f"{y:.3g}", left - 6, py + 4, "end"))
    return parts


def curve(line: Line, colour: str, dash: str, at) -> list[Markup]:
    """One curve, its band behind it."""
    parts = []
    if line.low is not None and line.high is not None:
        edge = [at(x, y) for x, y in zip(line.x, line.high, strict=True)]
        edge += [at(x, y) for x, y in zip(line.x, line.low, strict=True)][::-1]
        parts.append(element("polygon", points=points(edge), fill=colour, opacity=0.15))
    where = [at(x, y) for x, y in zip(line.x, line.y, strict=True)]
    shown = element("title", line.name)
    parts.append(
        element(
            "polyline", shown, points=points(where), fill="none", stroke=colour, stroke_width=2, stroke_dasharray=dash
        )
    )
    if len(where) < 15:
        for (px, py), x, y in zip(where, line.x, line.y, strict=True):
            said = element("title", f"{line.name}: {x:.4g}, {y:.4g}")
            parts.append(element("circle", said, cx=px, cy=py, r=3, fill=colour))
    return parts


def heatmap(figure: Heatmap) -> Markup:
    """Cells shaded from light to dark by their share of the range, with their numbers."""
    left = 20 + 7 * max((len(name) for name in figure.rows), default=0)
    top = 20 + 5 * max((len(name) for name in figure.columns), default=0)
    size, height = 46, 26
    low, high = figure.ends
    parts = []
    for j, name in enumerate(figure.columns):
        x = left + size * j + size / 2
        turned = f"rotate(-45 {x} {top - 6})"
        parts.append(element("text", name, x=x, y=top - 6, transform=turned))
    for i, name in enumerate(figure.rows):
        parts.append(label(name, left - 6, top + height * i + 17, "end"))
        for j, value in enumerate(figure.values[i]):
            if value != value:
                continue
            level = min(1.0, max(0.0, (float(value) - low) / (high - low or 1.0)))
            red, green, blue = (round(a + (b - a) * level) for a, b in ((255, 8), (247, 48), (236, 107)))
            said = element("title", f"{name}, {figure.columns[j]}: {value:.4g}")
            x, y = left + size * j, top + height * i
            parts.append(
                element("rect", said, x=x, y=y, width=size - 1, height=height - 1, fill=f"rgb({red},{green},{blue})")
            )
            ink = "#fff" if level > 0.5 else "#222"
            text = f"{value:.2f}"
            parts.append(element("text", text, x=x + size / 2, y=y + 17, text_anchor="middle", style=f"fill:{ink}"))
    box = (left + size * len(figure.columns) + 10 + 4 * top // 5, top + height * len(figure.rows) + 10)
    said = {"role": "img", "aria_label": figure.title}
    return element("svg", *parts, viewBox=f"0 0 {box[0]} {box[1]}", width=box[0], **said)


def label(text: str, x: float, y: float, anchor: str) -> Markup:
    """One piece of text."""
    return element("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor)


def points(where: Sequence[tuple[float, float]]) -> str:
    """Coordinates as SVG writes them."""
    return " ".join(f"{x},{y}" for x, y in where)
