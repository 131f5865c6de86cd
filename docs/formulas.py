"""A hook of mkdocs: formulas become MathML when the pages are built, so that a browser draws them by itself, without a script."""

import html
import re

from math_core import LatexToMathML

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)  # what arithmatex makes of \( \) and \[ \]
CONVERT = LatexToMathML().convert_with_local_state


def on_page_content(content: str, **kwargs: object) -> str:
    """Called by mkdocs for every page. LatexError for what is no formula."""
    return FORMULA.sub(lambda found: _mathml(html.unescape(found[3]), display=found[2] == "["), content)


def _mathml(formula: str, display: bool) -> str:
    drawn = CONVERT(formula.strip(), displaystyle=display)
    return f'<div class="formula">{drawn}</div>' if display else drawn  # wider than a phone: the block scrolls, not the page
