"""How Sphinx makes a site of these pages: ``make docs``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils.nodes import Text, document
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx

from nnunet_ima import __version__

project = "nnunet_ima"
author = "The nnunet_ima developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxarg.ext"]
exclude_patterns = ["examples"]
# A block of code says what language it is in.
highlight_language = "none"
# Quotes in commands and options are to be copied as they are typed.
smartquotes = False

# So that a link to a heading is one on GitHub, too.
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"nnunet_ima {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
# The pages themselves are in the repository.
html_show_sourcelink = html_copy_source = False

autodoc_member_order = "bysource"
# Shapes and units say more, and stand in the docstrings; types of unions fill half a page.
autodoc_typehints = "none"
# Else each attribute of a data class would stand there twice.
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    # Before Napoleon reads the sections, at 500.
    app.connect("autodoc-process-docstring", _prepare, priority=400)
    # Before Sphinx collects what is to be copied to the site, at 500.
    app.connect("doctree-read", _link_files, priority=400)
    app.connect("doctree-read", _set_dashes)


def _prepare(
    app: Sphinx,  # noqa: ARG001 (Sphinx calls it so)
    what: str,  # noqa: ARG001 (Sphinx calls it so)
    name: str,  # noqa: ARG001 (Sphinx calls it so)
    found: Any,  # noqa: ARG001 (Sphinx calls it so)
    options: Any,  # noqa: ARG001 (Sphinx calls it so)
    lines: list[str],
) -> None:
    """``(B, C, *spatial)`` is a shape, not the beginning of italics; ``low, high: ...`` are two names, none a type."""
    lines[:] = [re.sub(r"(?<!`)\*(?=spatial|patch)", r"\\*", line) for line in lines]
    lines[:] = [re.sub(r"^( +\w+), (\w+: )", r"\1/\2", line) for line in lines]


def _link_files(app: Sphinx, tree: document) -> None:
    """A link to a Markdown file that is no page, such as a benchmark's result, leads to the file, as to any other."""
    for link in list(tree.findall(pending_xref)):
        target = str(link.get("reftarget"))
        file = Path(app.srcdir, f"{target}.md")
        if link.get("refdomain") == "doc" and target not in app.env.found_docs and file.is_file():
            download = download_reference(reftarget=f"/{target}.md", refdoc=link["refdoc"])
            download += link.children
            link.replace_self(download)


def _set_dashes(app: Sphinx, tree: document) -> None:  # noqa: ARG001 (Sphinx calls it so)
    """Sphinx writes two hyphens between an attribute and what it means."""
    for text in list(tree.findall(Text)):
        if text == " -- ":
            text.parent.replace(text, Text(" – "))
