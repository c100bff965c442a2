"""Sphinx extension of the book: pages without nbdev's directives, and figures whose caption is their alternative text."""

import json
import re
import shutil
from pathlib import Path

from docutils import nodes

PACKAGE = Path(__file__).resolve().parents[2] / "vitplast"

DIRECTIVE = re.compile(
    r"^#\| .*\n?", re.MULTILINE
)  # `#| export` and the like, for nbdev and not for readers


def strip_directives(app, docname, source):
    "Take the directive lines out of a notebook's code cells, and cells that hold nothing else."
    if not app.env.doc2path(docname).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] = DIRECTIVE.sub("", "".join(cell["source"]))
    notebook["cells"] = [
        c
        for c in notebook["cells"]
        if c["cell_type"] != "code" or c["source"].strip()
    ]
    source[0] = json.dumps(notebook)


def caption_to_alt(app, doctree):
    "Give each picture of a cell the emphasised paragraph that follows the cell as its alternative text."
    for image in doctree.findall(nodes.image):
        cell = image
        while cell.parent is not None and "cell" not in cell.get("classes", []):
            cell = cell.parent
        if cell.parent is None or image.get("alt", "").strip():
            continue
        after = cell.parent[cell.parent.index(cell) + 1 :][:1]
        # a caption that counts is the output of the next cell
        after = after and list(after[0].findall(nodes.paragraph))[:1]
        caption = (
            after and len(after[0]) == 1 and isinstance(after[0][0], nodes.emphasis)
        )
        image["alt"] = (
            after[0].astext()
            if caption
            else "Figure; the text above says what it shows."
        )


def output_links(app, doctree):
    "Send the links in outputs, which Sphinx does not resolve, from notebooks to their pages."
    for link in doctree.findall(nodes.reference):
        uri = link.get("refuri", "")
        if uri.endswith(".ipynb") and "://" not in uri:
            link["refuri"] = uri[: -len("ipynb")] + "html"


def scripts(app, pagename, templatename, context, doctree):
    """Drop thebe, which names a server of others; of the two MathJax that are asked for keep the deferred one,
    which runs after its configuration."""
    files = [
        f
        for f in context.get("script_files", [])
        if "thebe" not in f"{f} {getattr(f, 'attributes', '')}".lower()
    ]
    deferred = {
        f.filename for f in files if "defer" in getattr(f, "attributes", {})
    }
    context["script_files"] = [
        f
        for f in files
        if getattr(f, "filename", None) not in deferred or "defer" in f.attributes
    ]


def source_line(app, pagename, templatename, context, doctree):
    "End a page with where it comes from: its notebook, and the module that the notebook exports."
    notebook = Path(app.srcdir) / f"{pagename}.ipynb"
    if not notebook.exists():
        return
    link = lambda path, text: (
        f'<a href="{context["pathto"](f"_sources/{path}", 1)}" download>{text}</a>'
    )
    line = "This page is the notebook " + link(
        f"{pagename}.ipynb", f"nbs/{pagename}.ipynb"
    )
    if (PACKAGE / f"{pagename}.py").exists():
        line += ", which exports " + link(
            f"vitplast/{pagename}.py.txt", f"vitplast/{pagename}.py"
        )
    context["body"] += f'<p class="source-line">{line}.</p>'


def copy_modules(app, exception):
    "Put the modules beside the notebooks that export them."
    target = Path(app.outdir) / "_sources" / "vitplast"
    if exception is None and app.builder.format == "html":
        for module in PACKAGE.rglob("*.py"):
            copy = target / f"{module.relative_to(PACKAGE)}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(module, copy)


def setup(app):
    app.connect("html-page-context", source_line)
    app.connect("build-finished", copy_modules)
    app.connect("html-page-context", scripts, priority=900)
    app.connect("source-read", strip_directives)
    app.connect("doctree-read", caption_to_alt)
    app.connect("doctree-read", output_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
