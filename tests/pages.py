"""What a page must keep to: HTML in, its text out, or an assertion that fails."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = frozenset({"meta", "img", "br"})
# Elements of SVG without content may close themselves.
SHAPES = frozenset({"rect", "path", "circle", "polyline", "line"})


class Page(HTMLParser):
    """Checks that tags are balanced, that nothing is loaded, and that what is wide can scroll."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in {"script", "link", "iframe", "object", "base"}
        self.references += [v for k, v in attributes if k in {"src", "href", "xlink:href"}]
        assert not any(k.startswith("on") for k, _ in attributes)
        self.tags.append(tag)
        if tag in {"table", "svg"}:  # wider than a phone: in a box of its own
            assert "scroll" in {cls for _, cls in self.open}, f"<{tag}> outside of a scrolling box"
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class") or ""))

    def handle_startendtag(self, tag, attributes):
        assert tag in SHAPES
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)
