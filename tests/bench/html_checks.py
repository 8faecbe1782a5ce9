"""What a page must not do, and what it must have: read from its text, without a browser."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img", "hr"}
LOADING = {
    "src",
    "srcset",
    "href",
    "xlink:href",
    "poster",
    "data",
    "action",
    "formaction",
    "background",
}
OUTSIDE = re.compile(r"(?i)^\s*(?:[a-z][a-z0-9+.-]*:)?//|^\s*(?:https?|ftp|file|blob):")


class Reader(HTMLParser):
    """Collects elements; `faults` holds what is broken."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.faults, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [name for name, _ in self.open]))
        names = [name for name, _ in attrs]
        if len(set(names)) != len(names):
            self.faults.append(f"<{tag}> says {names} twice")
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [name for name, _ in self.open]))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]} at {self.getpos()}")
            return
        self.open.pop()

    def handle_data(self, data):
        self.text.append((self.open[-1][0] if self.open else "", data))


def read(html):
    """Parse a page."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    reader.faults += [f"<{tag}> is never closed" for tag, _ in reader.open]
    return reader


def visible(reader):
    """The words that a reader sees."""
    words = " ".join(text for tag, text in reader.text if tag not in ("style", "script"))
    return re.sub(r"\s+", " ", words)


def outside(html):
    """Everything that a browser would fetch."""
    reader = read(html)
    found = []
    for tag, attributes, _ in reader.elements:
        for name, value in attributes.items():
            if name in LOADING and OUTSIDE.search(value or ""):
                found.append(f"<{tag} {name}={value}>")
            if name == "style" or name.startswith("on"):
                found += in_style(value or "")
        if tag in ("link", "iframe", "object", "embed", "base"):
            found.append(f"<{tag}>")
    for tag, text in reader.text:
        if tag == "style":
            found += in_style(text)
        if tag == "script":
            found += re.findall(r"fetch\(|XMLHttpRequest|import\s*\(|WebSocket|https?://", text)
    return found


def in_style(text):
    """What a style sheet loads."""
    return [
        *re.findall(r"@import[^;]*", text),
        *re.findall(r"url\(\s*['\"]?(?!data:|#)[^)]*", text),
    ]


def faults(html):
    """Broken structure: tags, ids, links within the page, names for those who cannot see it."""
    reader = read(html)
    found = list(reader.faults)
    ids = [a["id"] for _, a, _ in reader.elements if "id" in a]
    found += [f"id {name} is there twice" for name in sorted(set(ids)) if ids.count(name) > 1]
    for tag, a, parents in reader.elements:
        target = a.get("href") or ""
        if target.startswith("#") and target[1:] not in ids:
            found.append(f"<{tag} href={target}> leads nowhere")
        named = a.get("aria-label") or a.get("aria-hidden") == "true"
        if tag == "svg" and not named:
            found.append("an svg has no name and is not hidden")
        if tag == "img" and "alt" not in a:
            found.append("an img has no alt")
        if tag == "th" and a.get("scope") not in ("row", "col"):
            found.append("a th has no scope")
        if tag == "input" and "label" not in parents:
            found.append("an input has no label")
        if a.get("role") == "region" and (not named or a.get("tabindex") != "0"):
            found.append("a region cannot be reached or has no name")
    return found


def colours(css):
    """The variables of the light and of the dark theme, as (r, g, b) in [0, 1]."""
    light, dark = css.split("@media (prefers-color-scheme: dark)")
    first = variables(light.split("}")[0])
    return first, first | variables(dark.split("}")[0])


def variables(text):
    """`--name: #rgb` pairs of a block."""
    found = {}
    for name, value in re.findall(r"--([\w-]+):\s*#([0-9a-f]{3,6})\b", text):
        value = value if len(value) == 6 else "".join(2 * digit for digit in value)
        found[name] = tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return found


def contrast(one, other):
    """WCAG contrast ratio."""
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour):
    """WCAG relative luminance."""
    r, g, b = linear(colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def linear(colour):
    """sRGB to linear light."""
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)


def mixed(one, other, share):
    """Luminance-safe stand-in for a mix in oklab: the mix of both ends' cube-root lightness."""
    ends = [luminance(c) ** (1 / 3) for c in (one, other)]
    value = (share * ends[0] + (1 - share) * ends[1]) ** 3
    grey = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
    return (grey, grey, grey)
