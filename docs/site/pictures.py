"""The pictures of docs/concepts.md, as SVG: `python docs/site/pictures.py` writes them anew."""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pictures"
INK, QUIET, WARM, COOL = "#7d8590", "#9aa3ad", "#d9703a", "#3d86c6"  # readable on white and on black


def text(x: float, y: float, said: str, ink: str = INK, size: int = 14, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{ink}" font-size="{size}" text-anchor="{anchor}">{escape(said)}</text>'


def box(x: float, y: float, w: float, h: float, *lines: str, ink: str = INK) -> str:
    """A rectangle with lines of text in its middle."""
    size = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"'
    frame = f'<rect {size} rx="6" fill="none" stroke="{ink}" stroke-width="1.5"/>'
    first = y + h / 2 + 5 - 9 * (len(lines) - 1)
    return frame + "".join(text(x + w / 2, first + 18 * i, line, ink) for i, line in enumerate(lines))


def arrow(x1: float, y1: float, x2: float, y2: float, ink: str = INK) -> str:
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{ink}" stroke-width="1.5"'
        ' marker-end="url(#head)"/>'
    )


def column(x: float, y: float, values: list[float], ink: str, side: float = 16) -> str:
    """A vector as a column of squares, each as dark as its value."""
    cells = (
        f'<rect x="{x:g}" y="{y + i * side:g}" width="{side:g}" height="{side:g}" fill="{ink}" fill-opacity="{one:g}"'
        f' stroke="{QUIET}" stroke-width="0.7"/>'
        for i, one in enumerate(values)
    )
    return "".join(cells)


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """A whole file."""
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" font-family="system-ui, sans-serif"><title>{escape(title)}</title><defs>{head}</defs>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def sae() -> str:
    """A residual, its few active features, and the residual that they rebuild."""
    h, again = [0.6, 0.2, 0.9, 0.1, 0.5, 0.7], [0.55, 0.25, 0.85, 0.15, 0.5, 0.65]
    sparse = [0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.3, 0.0]
    return picture(
        640, 250, "An SAE writes a residual as a sum of a few features",
        column(40, 70, h, COOL), text(10, 190, "residual h", anchor="start"),
        text(10, 208, "d_model numbers", QUIET, 12, "start"),
        arrow(66, 118, 226, 118), text(146, 108, "W_enc h + b_enc"), text(146, 138, "the k largest stay", QUIET, 12),
        column(240, 22, sparse, WARM), text(248, 236, "d_sae numbers, k of them active", QUIET, 12),
        arrow(266, 118, 426, 118), text(346, 108, "W_dec a + b_dec"),
        column(440, 70, again, COOL), text(448, 190, "rebuilt"),
        arrow(466, 118, 540, 118), box(545, 93, 85, 50, "error", "h - rebuilt", ink=QUIET),
    )  # fmt: skip


def feature() -> str:
    """Two features over the tokens of a sentence."""
    tokens = ["Wo", "ist", "der", "Bahnhof", "?"]
    german, single = [0.45, 0.65, 0.9, 0.55, 0.0], [0.0, 0.0, 0.0, 0.4, 0.0]
    parts = [text(60 + 110, 30, "token", QUIET, 12, "end")]
    for i, token in enumerate(tokens):
        x = 190 + 80 * i
        parts.append(text(x + 35, 30, token))
        for y, values, ink in ((45, german, WARM), (85, single, COOL)):
            parts.append(
                f'<rect x="{x}" y="{y}" width="70" height="28" rx="4" fill="{ink}" fill-opacity="{values[i]:g}"'
                f' stroke="{QUIET}" stroke-width="0.7"/>'
            )
    parts += [text(170, 64, "5/678", INK, 14, "end"), text(170, 104, "5/17", INK, 14, "end")]
    parts += [text(600, 64, "the text is German", QUIET, 12, "start"), text(600, 104, "one token", QUIET, 12, "start")]
    return picture(720, 130, "Where two features are active", *parts)


def store() -> str:
    """From documents to a store, and what asks it."""
    steps = ["documents", "tokens", "residuals", "activations"]
    parts = []
    for i, step in enumerate(steps):
        parts += [box(10 + 125 * i, 40, 95, 40, step), arrow(105 + 125 * i, 60, 133 + 125 * i, 60)]
    parts.append(box(510, 30, 90, 60, "STORE", "Parquet", ink=WARM))
    for i, asks in enumerate(["find, show", "label, card", "analyze", "your own SQL"]):
        parts += [arrow(600, 60, 648, 25 + 32 * i), text(656, 30 + 32 * i, asks, INK, 14, "start")]
    parts.append(text(258, 110, "once, with the model: extract", QUIET, 12))
    return picture(760, 140, "Documents become a store, which many questions read", *parts)


def verdict() -> str:
    """What a verdict is decided by."""
    return picture(
        760, 210, "How a verdict comes about",
        box(10, 75, 120, 50, "change the", "feature"), arrow(130, 100, 178, 100),
        box(185, 75, 130, 50, "does the text", "move?"),
        arrow(315, 85, 378, 45), text(340, 52, "yes", QUIET, 12),
        arrow(315, 115, 378, 165), text(340, 160, "no", QUIET, 12),
        box(385, 20, 140, 50, "more than under", "the controls?"),
        box(385, 140, 140, 50, "does it fire", "there at all?"),
        arrow(525, 35, 578, 25), arrow(525, 55, 578, 75), arrow(525, 155, 578, 145), arrow(525, 175, 578, 185),
        text(585, 30, "causal", WARM, 14, "start"), text(585, 80, "entangled, breaks fluency", INK, 12, "start"),
        text(585, 150, "correlated only", COOL, 14, "start"), text(585, 190, "no effect", INK, 14, "start"),
    )  # fmt: skip


PICTURES = {"sae.svg": sae, "feature.svg": feature, "store.svg": store, "verdict.svg": verdict}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
