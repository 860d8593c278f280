"""Tables and token shading, inert whatever a text contains."""

from __future__ import annotations

import io

from rich.console import Console

from qwen_scope.report import shaded, size, table, visible


def printed(renderable: object, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(renderable)
    return out.getvalue()


def test_control_and_direction_characters_are_shown_not_obeyed() -> None:
    assert visible("a\nb\tc") == "a⏎b⇥c"
    assert visible("\x1b[31m") == "\\u001b[31m"
    assert visible("\u202eevil") == "\\u202eevil"
    assert visible("<script>") == "<script>"
    assert visible("你好 🙂 سلام") == "你好 🙂 سلام"


def test_tables_never_read_markup() -> None:
    assert "[bold]not markup[/bold]" in printed(table(("a",), [("[bold]not markup[/bold]",)]))


def test_tables_fit_and_keep_names_whole() -> None:
    name = "SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_100"
    text = printed(table(("group", "n", "what"), [(name, 131072, "word " * 40)]))
    assert name in text
    assert "131072" in text
    assert max(map(len, text.splitlines())) <= 80


def test_numbers_stand_right_and_text_left() -> None:
    lines = printed(table(("n", "t"), [(1, "a"), (None, "b"), (1000, "c")])).splitlines()
    assert [line[:4] for line in lines[1:]] == ["   1", "    ", "1000"]


def test_shading_follows_the_values() -> None:
    text = shaded(["a", "b", "c"], [0.0, 0.5, 1.0])
    assert text.plain == "abc"
    assert [span.start for span in text.spans] == [1, 2], "a zero has no shade"
    assert text.spans[0].style != text.spans[1].style
    assert shaded(["a"], [0.0]).spans == []
    assert shaded(["a", "b"], [0.0, 1.0], brackets=True).plain == "a[b]"


def test_sizes_as_people_say_them() -> None:
    assert [size(n) for n in (0, 999, 25_100, 2_150_000_000, 1.2e13)] == ["0 B", "999 B", "25.1 kB", "2.15 GB", "12 TB"]
