"""What the documentation's site needs beyond mkdocs: the repository's other pages, and formulas as MathML.

A page's links work where it lies in the repository. The site has no folder docs/, so they are rewritten.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
BLOCK, INLINE = (
    re.compile(rf'<{tag} class="arithmatex">(?:\\[\[(])(.*?)(?:\\[\])])</{tag}>', re.S) for tag in ("div", "span")
)


def in_site(path: str) -> str:
    """Where the site has a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files: Any, config: Any) -> Any:
    """The README is the home page. Pages at the root and the examples join it, and those that only links lead to."""
    linked = {*ROOT.glob("experiments/*/*.md"), *ROOT.glob("experiments/*/*.png"), *ROOT.glob("plugins/*/README.md")}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("examples/*.*"), *linked]:
        level = InclusionLevel.NOT_IN_NAV if path in linked else InclusionLevel.UNDEFINED
        name = in_site(path.relative_to(ROOT).as_posix())
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links where the site has their targets. A link to a file that the site lacks becomes its text."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # it would be one word
    folder = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()

    def rewritten(link: re.Match[str]) -> str:
        picture, text, target, anchor = link.groups(default="")
        path = normpath(join(folder, target))
        if not path.startswith("docs/") and files.get_file_from_path(in_site(path)) is None:
            return text
        return f"{picture}[{text}]({relpath(in_site(path), dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(rewritten, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    content = BLOCK.sub(lambda formula: f'<div class="formula">{mathml(formula[1], "block")}</div>', content)
    return INLINE.sub(lambda formula: mathml(formula[1], "inline"), content)


def mathml(latex: str, display: str) -> str:
    """One formula; the LaTeX comes out of a page, with &, < and > escaped."""
    return convert(html.unescape(latex), display=display)
