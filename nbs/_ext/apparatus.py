"""Sphinx extension of the book: what a reader cites and looks up, made from the pages as they are written.

Figures and tables get numbers, theorems anchors, every "Theorem 12" a link, the glossary's words one at their first use; each page says its kind,
its seconds, its stores, and where it can be launched, if `repository` is set.
"""

import json
import re
import subprocess
from pathlib import Path

from docutils import nodes

NBS = Path(__file__).resolve().parents[1]
KINDS = {
    "start": "Tutorial",
    "theory": "Explanation",
    "experiments": "Experiment",
}  # by folder; the library's rooms are reference
ROOMS = "Tutorial"  # the page that opens a room
# words of the glossary that everyday sentences use in another sense
EVERYDAY = {
    "kind",
    "all",
    "head",
    "run",
    "task",
    "split",
    "edge",
    "key",
    "record",
    "gain",
    "arm",
    "grid",
    "bound",
    "store",
    "matrices",
    "norms",
    "place",
    "points",
    "union",
    "twin",
}
THEOREMS = re.compile(r"\bTheorems? \d+(?:(?:, | and | to | or )\d+\b)*")
GLOSSARY = "start/words"


def markdown(page) -> str:
    "The text of a notebook's markdown cells."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(
        "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
    )


def code(page) -> str:
    "The source of a notebook's code cells."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n".join(
        "".join(c["source"]) for c in cells if c["cell_type"] == "code"
    )


def slug(word) -> str:
    "A word as the end of an address."
    return "word-" + re.sub(r"\W+", "-", word.lower()).strip("-")


def theorems() -> dict:
    "Number -> page of each theorem."
    return {
        int(number): f"theory/{page.stem}"
        for page in sorted(NBS.glob("theory/*.ipynb"))
        for number in re.findall(
            r"^> \*\*Theorem (\d+)", markdown(page), re.MULTILINE
        )
    }


def glossary() -> dict:
    "Word -> (address, meaning in plain text) of each row of the glossary."
    found = {}
    for words, meaning in re.findall(
        r"^\| \*\*(.+?)\*\* \| (.+?) \|$",
        markdown(NBS / f"{GLOSSARY}.ipynb"),
        re.MULTILINE,
    ):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", meaning)
        for word in words.split(", "):
            found[word] = slug(words), plain
    return found


def paragraphs(doctree):
    "Paragraphs of a page's own text: not of a table, a quotation or an output."
    for paragraph in doctree.findall(nodes.paragraph):
        within, node = False, paragraph.parent
        while node is not None and not within:
            within = isinstance(node, (nodes.table, nodes.block_quote))
            within |= "cell_output" in node.get("classes", ())
            node = node.parent
        if not within:
            yield paragraph


def plain_texts(paragraph, names=()) -> list:
    "The pieces of text in a paragraph that are not formulas, links or code, but for code that is a name."
    found, kept = [], (nodes.emphasis, nodes.strong, nodes.inline)
    for text in list(paragraph.findall(nodes.Text)):
        node = text.parent
        if isinstance(node, nodes.literal) and text.astext() in names:
            node = node.parent
        while isinstance(node, kept):
            node = node.parent
        if node is paragraph:
            found.append(text)
    return found


def put(text, places):
    "Replace parts of a text by nodes; places: (start, end, node) in order."
    pieces, last, whole = [], 0, text.astext()
    for start, end, node in places:
        pieces += [nodes.Text(whole[last:start]), node]
        last = end
    text.parent.replace(
        text, [p for p in [*pieces, nodes.Text(whole[last:])] if p.astext()]
    )


def link(uri, text, classes=(), title="") -> nodes.reference:
    "A link with a text."
    more = {"reftitle": title} if title else {}
    return nodes.reference(
        "", text, refuri=uri, internal=True, classes=list(classes), **more
    )


def anchored(node, name, label) -> nodes.reference:
    "A link of a place to itself, which a reader copies."
    node["ids"].append(name)
    return nodes.reference("", label, refid=name, classes=["anchor"])


# -- when a page is read


def number_captions(app, doctree):
    "Number the emphasised paragraph after a picture or a table, and give it an address."
    counts = {"Figure": 0, "Table": 0}
    for caption in list(doctree.findall(nodes.paragraph)):
        if len(caption) != 1 or not isinstance(caption[0], nodes.emphasis):
            continue
        host = caption
        while host.parent is not None and "cell" not in host.get("classes", ()):
            host = host.parent
        host = caption if host.parent is None else host
        place = host.parent.index(host) if host.parent is not None else 0
        kind = shown(host.parent[place - 1]) if place else ""
        if kind:
            counts[kind] += 1
            label = f"{kind} {counts[kind]}"
            number = anchored(
                caption, f"{kind.lower()}-{counts[kind]}", f"{label}."
            )
            caption.insert(0, [number, nodes.Text(" ")])
            caption["classes"].append("caption")


def shown(node) -> str:
    "What stands before a caption: a Figure, a Table, or neither."
    if isinstance(node, nodes.table):
        return "Table"
    outputs = [
        n
        for n in node.findall(nodes.container)
        if "cell_output" in n.get("classes", ())
    ]
    if not outputs:
        return ""
    return "Figure" if any(True for _ in node.findall(nodes.image)) else "Table"


def anchor_theorems(app, doctree):
    "Give each theorem an address."
    for quote in doctree.findall(nodes.block_quote):
        first = next(iter(quote.findall(nodes.strong)), None)
        if first is None or not (
            m := re.match(r"Theorem (\d+)[^.]*\.?", first.astext())
        ):
            continue
        label = anchored(quote, f"theorem-{m[1]}", first.astext())
        first.children = []
        first += label


def anchor_words(app, doctree):
    "Give each row of the glossary an address."
    if app.env.docname != GLOSSARY:
        return
    for row in doctree.findall(nodes.row):
        first = next(iter(row.findall(nodes.strong)), None)
        if first is not None:
            row[0]["ids"].append(slug(first.astext()))


def describe(app, doctree):
    "A page's own sentence for whoever links to it, instead of the book's."
    quote = next(iter(doctree.findall(nodes.block_quote)), None)
    title = next(iter(doctree.findall(nodes.title)), None)
    if quote is None or title is None:
        return
    for meta in doctree.findall(nodes.meta):
        if "description" in (meta.get("name"), meta.get("property", "")[3:]):
            meta["content"] = quote.astext()
        elif meta.get("property") == "og:title":
            meta["content"] = f"{title.astext()} (vitplast)"


def launch(repository, name) -> list:
    "(text, address) of a notebook in a repository and on Colab; none without one."
    if not repository:
        return []
    path = f"blob/main/nbs/{name}.ipynb"
    launched = [("source", f"{repository}/{path}")]
    if "github.com/" in repository:
        owner = repository.split("github.com/")[1]
        colab = "https://colab.research.google.com/github"
        launched.append(("open in Colab", f"{colab}/{owner}/{path}"))
    return launched


def facts(name) -> list:
    "What a page is, what it takes, and what it draws from, in a few words each."
    page = NBS / f"{name}.ipynb"
    folder, _, stem = name.rpartition("/")
    room = stem in ("room", "shell")
    said = [ROOMS if room else KINDS.get(folder, "Reference")]
    times = json.loads((NBS / "results/seconds.json").read_text())
    if name in times:
        said.append(f"runs in {times[name]} s on one core, results found")
    source = code(page)
    asked = re.findall(
        r"results/([\w-]+)|\.(?:store|measured)\(\"([\w-]+)\"", source
    )
    stores = dict.fromkeys(a or b for a, b in asked)
    stores = [s for s in stores if (NBS / f"results/{s}/runs.jsonl").exists()]
    if stores:
        said.append(f"draws from {', '.join(stores)}")
    if "at_scale(" in source and folder == "experiments":
        said.append("the first table has its hours at other scales")
    return said


def say_facts(app, doctree):
    "Put the facts of a page below its first quoted line."
    name = app.env.docname
    quote = next(iter(doctree.findall(nodes.block_quote)), None)
    if quote is None or name == "index" or not (NBS / f"{name}.ipynb").exists():
        return
    line = nodes.paragraph("", " · ".join(facts(name)), classes=["page-facts"])
    for text, uri in launch(app.config.repository, name):
        line += [nodes.Text(" · "), nodes.reference("", text, refuri=uri)]
    quote.parent.insert(quote.parent.index(quote) + 1, line)


# -- when a page is written


def link_theorems(app, doctree, docname):
    "Send every theorem that a text names to its place."
    for paragraph in list(doctree.findall(nodes.paragraph)):
        for text in plain_texts(paragraph):
            places, whole = [], text.astext()
            for found in THEOREMS.finditer(whole):
                for m in re.finditer(r"(?:Theorems? )?(\d+)", found[0]):
                    if page := app.theorems.get(int(m[1])):
                        start = found.start() + m.start()
                        uri = f"{app.builder.get_relative_uri(docname, page)}#theorem-{m[1]}"
                        places.append((start, start + len(m[0]), link(uri, m[0])))
            if places:
                put(text, places)


def link_words(app, doctree, docname):
    "Send each word of the glossary to its row where a page first uses it."
    if docname in (GLOSSARY, "index", "api", "changelog", "references"):
        return
    left = {w: v for w, v in app.words.items() if w not in EVERYDAY}
    for paragraph in list(paragraphs(doctree)):
        for text in plain_texts(paragraph, names=[*left]):
            places, taken = [], []
            for word in sorted(left, key=len, reverse=True):
                letters = re.escape(word) + ("" if word.isupper() else "s?")
                m = re.search(rf"\b{letters}\b(?!-)", text.astext())
                if m and not any(s < m.end() and m.start() < e for s, e in taken):
                    name, meaning = left.pop(word)
                    uri = app.builder.get_relative_uri(docname, GLOSSARY)
                    node = link(f"{uri}#{name}", m[0], ["word"], meaning)
                    places.append((m.start(), m.end(), node))
                    taken.append(m.span())
            if places:
                put(text, sorted(places, key=lambda p: p[0]))


def name_answers(app, pagename, templatename, context, doctree):
    "What folds an exercise's answer says so."
    if "body" in context and pagename.startswith("theory/"):
        context["body"] = re.sub(
            r">(Show|Hide) code cell content<", r">\1 the answer<", context["body"]
        )


def stamp(app, pagename, templatename, context, doctree):
    "End a page with the version and the day of what it shows."
    if "body" in context:
        context["body"] += f'<p class="source-line">{app.stamp}.</p>'


def prepare(app):
    "What is known of the whole book before its pages are read."
    app.theorems, app.words = theorems(), glossary()
    settings = (NBS.parent / "settings.ini").read_text()
    version = re.search(r"^version = (.+)$", settings, re.MULTILINE)[1]
    command = ["git", "-C", NBS, "log", "-1", "--format=%cs"]
    day = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    app.stamp = f"vitplast {version}" + f", {day}" * bool(day)


def setup(app):
    app.add_config_value("repository", "", "html")
    app.connect("builder-inited", prepare)
    for on_read in (
        number_captions,
        anchor_theorems,
        anchor_words,
        describe,
        say_facts,
    ):
        app.connect("doctree-read", on_read, priority=600)
    app.connect("doctree-resolved", link_theorems)
    app.connect("doctree-resolved", link_words)
    app.connect("html-page-context", name_answers)
    app.connect("html-page-context", stamp, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
