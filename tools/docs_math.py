"""A hook of mkdocs: turn the formulas of a page into MathML, which browsers draw without scripts or fonts."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]  # of requirements-docs.txt

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Return the page with its formulas as MathML."""
    content = _BLOCK.sub(lambda found: convert(html.unescape(found[1]).strip(), display="block"), content)
    content = _INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    if "arithmatex" in content:
        raise ValueError("docs_math: a formula of the page was not recognised")
    return content
