"""What a reader stumbles over, where it can be counted: long sentences, missing questions, headlines that do not fit one breath."""
import ast
import json
import re

import pytest
from test_house import ROOT

PAGES = sorted((ROOT / "nbs/experiments").glob("*.ipynb"))
# phrases that had to be read twice (READER.md), each of which has a plain form
HABITS = r"\b(ours|theirs one|theirs|by mean(?=[,.;:)]| and | over )|hangs? on|minds? the (learning )?rate|cannot be told|not to be told|said aloud)\b"


def texts(page) -> list:
    "The prose of a page: its paragraphs without tables, code, formulas and the targets of links."
    found = []
    for cell in json.loads(page.read_text())["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = "".join(cell["source"])
        text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.DOTALL)
        for block in re.split(r"\n\s*\n|\n(?=[-*>#|] )", text):
            if not re.match(r"\s*[#|]", block):
                block = re.sub(r"\]\([^)]*\)", "]", block)
                found.append(re.sub(r"\$[^$]*\$", "x", block).replace("\n", " "))
    return found


def sentences(text) -> list:
    "Sentences, split where one ends and the next begins with a capital letter, a number or markup."
    return [s for s in re.split(r"(?<=[.!?])[*)\"]* +(?=[A-Z0-9*`\[(\"])|(?<=:) *\Z", text) if s.strip()]


def test_sentences_are_split_where_a_reader_breathes():
    text = "One claim, e.g. this one. Then its number: 0.3 points. *A caption.* `MHA` leads."
    assert [len(s.split()) for s in sentences(text)] == [5, 5, 2, 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_of_experiments_asks_finds_and_is_read_once(page):
    prose = texts(page)
    whole = " ".join(prose)
    headings = "\n\n".join("".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "markdown")
    assert re.search(r"\*\*(The|Two|Three) questions?\.?\*\*", whole), "a page says what it asks"
    assert re.search(r"^## What was found", headings, re.MULTILINE), "a page ends with what it found"
    long = [s for t in prose for s in sentences(t) if len(s.split()) > 45]
    assert long == [], "over 45 words"
    assert re.findall(HABITS, whole) == [], "say who does what"


@pytest.mark.parametrize("file", sorted((ROOT / "nbs/results/headlines").glob("*.txt")), ids=lambda p: p.stem)
def test_a_headline_is_one_breath(file):
    assert len(file.read_text().split()) <= 30


def lines_of(source):
    "Kind and name of the functions and classes of a cell, and how many lines are code, and docstring, of each."
    tree = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            said = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            yield type(node).__name__, node.name, node.end_lineno - node.lineno + 1 - said, said


def test_what_is_long_is_counted(capsys):
    """Exported cells of more than 40 lines: a number that may only fall. A class stays in one cell, and may have
    100 lines, where none of its methods has more than 30: a chain of classes that are one would be harder to read.
    Docstrings are not counted: what a user must know of a function takes as many lines as it has parameters."""
    long, classes = [], []
    for page in sorted((ROOT / "nbs").glob("*/*.ipynb")) + sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(page.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or len(cell["source"]) <= 40 or "export" not in "".join(cell["source"][:2]):
                continue
            found = list(lines_of(source))
            n_lines = len(cell["source"]) - sum(said for *_, said in found)
            if n_lines <= 40:
                continue
            one = [name for kind, name, *_ in found if kind == "ClassDef"]
            longest = max((n for kind, _, n, _ in found if kind == "FunctionDef"), default=0)
            fits = len(one) == 1 and longest <= 30 and n_lines <= 100
            (classes if fits else long).append((n_lines, page.stem))
    with capsys.disabled():
        print(f" exported cells over 40 lines: {len(classes)} classes, {len(long)} others, longest {max(classes + long)}", end="")
    assert len(long) <= 3


def breathless(cells) -> int:
    "Code cells that follow another without a sentence; folded ones and imports are left out."
    found, before = 0, None
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            tags = cell["metadata"].get("tags", [])
            folded = any(t.startswith(("hide", "remove")) for t in tags)
            imports = all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)).body)
            if folded or imports:
                continue
            found += before == "code"
        before = cell["cell_type"]
    return found


def test_code_has_a_sentence_before_it():
    "No code cell directly after another."
    loose = {p.stem: n for p in sorted((ROOT / "nbs").glob("*/*.ipynb")) + sorted((ROOT / "nbs").glob("*.ipynb")) if (n := breathless(json.loads(p.read_text())["cells"]))}
    assert loose == {}
