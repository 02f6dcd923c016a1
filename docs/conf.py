"""The documentation site: ``scripts/docs`` builds it into build/docs, strictly and without a network.

The pages are also read as plain files, so they link to one another and to the files around them by relative paths. A page
of ``PROJECT`` is a file at the root of the repository, which stands in the site without a copy.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from command_line import page  # noqa: E402 (found by the line above)
from docstrings import process  # noqa: E402 (found by the line above)

project = "srd-lab"
author = "the srd-lab authors"
copyright = "2026, the srd-lab authors"
version = release = version_of("srd-lab")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["entries", "package_index.md"]
smartquotes = False  # quotes and dashes stay what one types
html_theme = "furo"
html_title = f"srd-lab {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
# What a page shows as a shell session or a table is no language of Pygments.
highlight_language = "none"

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_ipywidgets_js: dict[str, Any] = {}  # they would be loaded from elsewhere
nb_merge_streams = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

# page -> the file at the root whose text it shows
PROJECT = {
    "readme": "README.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/changelog": "CHANGELOG.md",
    "project/security": "SECURITY.md",
}
_RULE = re.compile(r"[- ]*---[- ]*")  # below the header of a printed table
_NARROW = 118  # letters, which need no smaller ones
_LINK = re.compile(r"\[([^]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
    app.connect("env-get-outdated", _outdated)
    app.connect("autodoc-process-docstring", process)
    app.connect("doctree-read", _sized)


def _sized(app: Sphinx, tree: nodes.document) -> None:
    """Tell the style sheet of printed tables that are wide: ``columns-145`` and ``columns-172`` are letters in a line."""
    for block in tree.findall(nodes.literal_block):
        rules = [line for line in block.astext().splitlines() if _RULE.fullmatch(line)]
        widest = max(map(len, rules), default=0)
        if widest > _NARROW:
            block["classes"].append("columns-145" if widest <= 145 else "columns-172")


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Take the text of a page of ``PROJECT`` from its file; let links to such files lead to their pages."""
    file = ROOT / PROJECT[docname] if docname in PROJECT else Path(app.env.doc2path(docname))
    if docname in PROJECT:
        app.env.note_dependency(file)
        source[0] = file.read_text(encoding="utf-8")
    if docname == "reference/command_line":
        source[0] += page()
        for code in (ROOT / "srd_lab" / "cli").glob("*.py"):
            app.env.note_dependency(code)
    if file.suffix == ".md":
        source[0] = _LINK.sub(lambda link: _link(file, docname, *link.groups()), source[0])


def _link(file: Path, docname: str, text: str, path: str, anchor: str | None) -> str:
    """A link of ``file`` as the page ``docname`` has it; a folder has no page."""
    aim = (file.parent / path).resolve()
    if aim.is_dir():
        return text
    pages = {ROOT / name: DOCS / f"{page}.md" for page, name in PROJECT.items()}
    steps = os.path.relpath(pages.get(aim, aim), (DOCS / docname).parent)
    return f"[{text}]({Path(steps).as_posix()}{anchor or ''})"


def _outdated(app: Sphinx, env: BuildEnvironment, *_: set[str]) -> list[str]:
    """Notebooks run again whenever the code has changed since they last ran."""
    code = max(
        file.stat().st_mtime
        for part in ("srd_lab", "attacks", "apop")
        for file in (ROOT / part).rglob("*.py")
    )
    notebooks = [page for page in env.found_docs if page.startswith("notebooks/")]
    return [page for page in notebooks if env.all_docs.get(page, 0) / 1e6 < code]
