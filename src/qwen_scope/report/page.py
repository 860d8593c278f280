"""One HTML file that needs nothing else: no server, no script, no other file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qwen_scope.errors import printable

from .markup import Child, Markup, element, join
from .tokens import SHADES, level, visible

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1c1c1c;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:1.8rem 0 .4rem}p{margin:.3rem 0}
table{border-collapse:collapse}td,th{text-align:left;padding:.15rem 1rem .15rem 0;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}th{color:#5a5a5a;font-weight:600}
.context{font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
margin:.35rem 0;padding:.3rem .5rem;border:1px solid #ddd;border-radius:4px}
.context span{unicode-bidi:isolate}.out{outline:1px dashed #767676;color:#5a5a5a}
.place{color:#5a5a5a;font-size:.85em}.side{display:flex;gap:3rem;flex-wrap:wrap}
""" + "".join(
    f".s{i}{{background:{shade};color:{'#fff' if i == len(SHADES) - 1 else '#000'}}}" for i, shade in enumerate(SHADES)
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html_page(title: str, *body: Child) -> str:
    """A whole document; the policy in its head forbids scripts, images and any request. Control codes are escaped."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name_="viewport", content="width=device-width"),
        element("title", visible(title)),
        element("style", Markup(STYLE)),
    )
    return printable("<!doctype html>\n" + element("html", head, element("body", *body), lang="en") + "\n", keep="\n\t")


def styled(body: Markup) -> str:
    """A piece of a page for a notebook: the page's marks, which hold inside of it alone, whatever the theme."""
    scope = "qwen-scope"
    rules = re.sub(r"(^|[}\n])([^{}@]+){", lambda m: f"{m[1]}{within(m[2], scope)}{{", STYLE)
    return printable(join(element("style", Markup(rules)), element("div", body, class_=scope)), keep="\n\t")


def within(selectors: str, scope: str) -> str:
    """Selectors that match inside of an element of a class alone; `body` is that element itself."""
    some = (one.strip() for one in selectors.split(","))
    return ",".join(f".{scope}" if one == "body" else f".{scope} {one}" for one in some)


def html_tokens(
    tokens: Sequence[str], values: Sequence[float], maximum: float, place: str = "", left_out: Sequence[str] = ()
) -> Markup:
    """A line of tokens shaded by their values, each with its value as a tip; the text is inert.

    Args:
        left_out: per token why it does not count, "" where it does; those have a dashed frame.
    """
    shown: list[Child] = [element("span", f"{place} ", class_="place")] if place else []
    for token, value, reason in zip(tokens, values, left_out or [""] * len(tokens), strict=True):
        shade, text = level(value, maximum), visible(token)
        tips = [*([] if shade is None else [f"{value:.4g}"]), *([f"left out: {reason}"] if reason else [])]
        classes = [*([] if shade is None else [f"s{shade}"]), *(["out"] if reason else [])]
        shown.append(element("span", text, class_=" ".join(classes), title=", ".join(tips)) if classes else text)
    return element("div", *shown, class_="context", dir="auto")


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str | int | float | None]]) -> Markup:
    """A table with numbers to the right."""
    cells = [[(f"{cell:.4g}" if isinstance(cell, float) else cell, cell) for cell in row] for row in rows]
    body = [
        element("tr", *(element("td", text, class_=None if isinstance(cell, str) else "n") for text, cell in row))
        for row in cells
    ]
    right = [bool(cells) and not isinstance(cells[0][i][1], str) for i in range(len(columns))]
    head = [element("th", name, class_="n" if number else None) for name, number in zip(columns, right, strict=True)]
    return element("table", element("tr", *head), *body)


def html_bars(edges: Sequence[float], counts: Sequence[int], width: int = 600, height: int = 120) -> Markup:
    """A histogram as SVG; the height of a bar is the square root of its count, so that rare strong values show."""
    top = max(counts, default=0) ** 0.5 or 1.0
    step = width / max(1, len(counts))
    bars = []
    for i, count in enumerate(counts):
        tall = height * count**0.5 / top
        tip = element("title", f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {count}")
        bars.append(
            element("rect", tip, x=f"{i * step:.1f}", y=f"{height - tall:.1f}", width=f"{step - 1:.1f}",
                    height=f"{tall:.1f}", fill=SHADES[3])
        )  # fmt: skip
    size = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}", "role": "img"}
    drawn = element("svg", *bars, xmlns="http://www.w3.org/2000/svg", aria_label="histogram", **size)
    return join(drawn, element("p", f"0 to {edges[-1]:.4g}; heights are square roots of counts", class_="place"))
