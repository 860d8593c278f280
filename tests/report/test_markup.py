"""HTML made from values: whatever a text holds, it stays text."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from qwen_scope.report import Markup, element, escaped, join


class Read(HTMLParser):
    """What a reader of HTML finds: elements with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r")))
def test_any_text_comes_back_as_text(text: str) -> None:
    found = Read(element("p", text, title=text))
    assert [name for name, _ in found.elements] == ["p"]
    assert found.elements[0][1] == {"title": text}
    assert found.text == text


def test_hostile_text_makes_no_element_and_no_template() -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>${alert(1)}{{this}}`'\""
    made = element("b", hostile, title=hostile)
    assert [name for name, _ in Read(made).elements] == ["b"]
    for sign in ("${", "{{", "`", "<script", "<img"):
        assert sign not in made


def test_markup_stays_and_text_does_not() -> None:
    inner = element("i", "a<b")
    assert element("p", inner, " & ", 3, None) == "<p><i>a&lt;b</i> &amp; 3</p>"
    assert join("<", Markup("<br>")) == "&lt;<br>"
    assert escaped(None) == ""


def test_attributes() -> None:
    made = element("input", class_="x", data_pick="feature:3", disabled=True, hidden=False, title=None)
    assert made == '<input class="x" data-pick="feature:3" disabled>'
