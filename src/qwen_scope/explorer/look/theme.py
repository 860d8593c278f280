"""Fonts, spacing and colours of the page, in light and dark; `page.css` draws our own parts with the same names."""

from __future__ import annotations

from gradio.themes import Base, sizes

SANS = ("Inter", "ui-sans-serif", "system-ui", "Segoe UI", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Noto Sans Mono", "DejaVu Sans Mono", "monospace")

# name: (light, dark). Activation (`heat`), probability (`prob`) and changed positions (`changed`) differ for every
# common kind of colour blindness, as do the two sides, and lightness carries strength.
COLOURS = {
    "paper": ("#faf9f7", "#151413"),
    "surface": ("#ffffff", "#1d1c1a"),
    "sunken": ("#f3f1ed", "#262422"),
    "line": ("#e6e2db", "#34312d"),
    "ink": ("#1c1a17", "#eeeae3"),
    "quiet": ("#625c53", "#a39c91"),
    "accent": ("#1f5fa8", "#8ebcf2"),
    "on-accent": ("#ffffff", "#10233a"),
    "heat": ("#f29233", "#a3530b"),
    "prob": ("#62b39b", "#25705f"),
    "changed": ("#b9a1ee", "#6a4fb0"),
    "side-a": ("#2f6fb4", "#5d9ce0"),
    "side-b": ("#a8326e", "#e07bb0"),
    "wrong": ("#8a3b12", "#f0b48a"),
}


def variables() -> str:
    """The colours as CSS variables for light and dark."""
    light = "".join(f"--qs-{name}:{pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f"--qs-{name}:{pair[1]};" for name, pair in COLOURS.items())
    return f":root{{{light}}}.dark{{{dark}}}"


def theme() -> Base:
    """Gradio's own parts in the same colours; no font is fetched from anywhere."""
    made = Base(font=list(SANS), font_mono=list(MONO), radius_size=sizes.radius_md, text_size=sizes.text_md)

    def both(name: str, colour: str) -> dict[str, str]:
        return {name: COLOURS[colour][0], f"{name}_dark": COLOURS[colour][1]}

    return made.set(
        **both("body_background_fill", "paper"),
        **both("body_text_color", "ink"),
        **both("body_text_color_subdued", "quiet"),
        **both("background_fill_primary", "surface"),
        **both("background_fill_secondary", "sunken"),
        **both("block_background_fill", "paper"),
        **both("block_label_text_color", "quiet"),
        **both("block_title_text_color", "quiet"),
        **both("block_info_text_color", "quiet"),
        **both("border_color_primary", "line"),
        **both("border_color_accent", "accent"),
        **both("color_accent_soft", "sunken"),
        **both("input_background_fill", "surface"),
        **both("input_border_color", "line"),
        **both("input_border_color_focus", "accent"),
        **both("button_primary_background_fill", "accent"),
        **both("button_primary_background_fill_hover", "accent"),
        **both("button_primary_text_color", "on-accent"),
        **both("button_secondary_background_fill", "sunken"),
        **both("button_secondary_text_color", "ink"),
        **both("checkbox_background_color_selected", "accent"),
        **both("checkbox_border_color_selected", "accent"),
        **both("slider_color", "accent"),
        **both("link_text_color", "accent"),
        **both("link_text_color_hover", "accent"),
        **both("link_text_color_visited", "accent"),
        block_border_width="0px",
        block_shadow="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_title_text_size="12px",
        block_title_text_weight="500",
        input_border_width="1px",
        layout_gap="16px",
    )
