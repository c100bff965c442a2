"""What a reader cites and looks up: numbers of figures, addresses of theorems, links to the glossary, a page's facts."""
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from test_house import ROOT, chapters

sys.path.insert(0, str(ROOT / "nbs/_ext"))
import apparatus  # noqa: E402


class Prose(HTMLParser):
    "The paragraphs of a page's text as pieces (text, linked or not); tables, quotations, code and formulas left out."
    OUTSIDE = {"table", "blockquote", "pre", "script", "style", "nav", "footer", "h1", "h2", "h3"}

    def __init__(self, html):
        super().__init__()
        self.pieces, self.open, self.paragraph = [], [], 0
        self.feed(re.search(r"<article.*?</article>", html, re.DOTALL)[0])

    def handle_starttag(self, tag, attrs):
        classes = dict(attrs).get("class") or ""
        if tag not in ("img", "br", "input", "hr", "source", "col"):
            self.open.append((tag, classes))

    def handle_endtag(self, tag):
        if any(t == tag for t, _ in self.open):
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        tags = {t for t, _ in self.open}
        classes = " ".join(c for _, c in self.open)
        if "p" in tags and not tags & self.OUTSIDE and not re.search(r"cell_output|math|page-facts|source-line", classes):
            code = "code" in tags
            self.pieces.append((data, "a" in tags, code))


def test_every_theorem_has_an_address_and_every_mention_of_one_leads_there(book):
    places = apparatus.theorems()
    assert sorted(places) == list(range(1, len(places) + 1)) and len(places) > 40
    linked = 0
    for chapter in chapters():
        html = (book / f"{chapter}.html").read_text(encoding="utf-8")
        own = [n for n, page in places.items() if page == chapter]
        assert [int(n) for n in re.findall(r'<blockquote id="theorem-(\d+)"', html)] == own
        for address, number in re.findall(r'href="([^"]*)#theorem-(\d+)"', html):
            linked += 1
            assert not address or address.split("/")[-1] == places[int(number)].split("/")[-1] + ".html"
        loose = [text for text, link, code in Prose(html).pieces if not link and not code and re.search(r"\bTheorems? \d", text)]
        assert loose == [], chapter
    assert linked > 2 * len(places)


def test_figures_and_tables_are_counted_on_each_page(book):
    numbered = 0
    for chapter in chapters():
        html = (book / f"{chapter}.html").read_text(encoding="utf-8")
        for kind in ("figure", "table"):
            numbers = [int(n) for n in re.findall(rf'<p class="caption" id="{kind}-(\d+)"', html)]
            assert numbers == list(range(1, len(numbers) + 1))
            numbered += len(numbers)
    assert numbered > 150


@pytest.mark.parametrize("chapter", [c for c in chapters() if c.startswith(("theory/", "experiments/"))])
def test_a_word_of_the_glossary_is_a_link_where_it_is_first_used(book, chapter):
    html = (book / f"{chapter}.html").read_text(encoding="utf-8")
    pieces = Prose(html).pieces
    for word in apparatus.glossary():
        if word in apparatus.EVERYDAY:
            continue
        first = next(((text, link) for text, link, code in pieces if not link and not code and re.search(rf"\b{re.escape(word)}{'' if word.isupper() else 's?'}\b(?!-)", text)), None)
        before = "".join(f"<{text}>" if link else "" for text, link, code in pieces[: next((i for i, p in enumerate(pieces) if first and p[0] is first[0]), 0)])
        assert first is None or word in before, f"{word!r} stands unlinked: {first[0]!r}"


def test_links_to_the_glossary_say_what_a_word_means(book):
    found = [m for c in chapters() for m in re.findall(r'<a class="word[^>]*title="([^"]+)"', (book / f"{c}.html").read_text(encoding="utf-8"))]
    assert len(found) > 300 and all(len(meaning) > 20 for meaning in found)


def test_a_page_says_what_it_is(book):
    kinds = {}
    for chapter in set(chapters()) - {"index"}:
        found = re.search(r'<p class="page-facts">(\w+)', (book / f"{chapter}.html").read_text(encoding="utf-8"))
        kinds[chapter] = found and found[1]
    assert {k for c, k in kinds.items() if c.startswith("experiments/")} == {"Experiment"}
    assert kinds["start/yours"] == "Tutorial" and kinds["theory/norms"] == "Explanation" and kinds["runs/store"] == "Reference"
    unions = (book / "experiments/unions.html").read_text(encoding="utf-8")
    assert re.search(r"draws from unions, offline-cpu-separate, peft", unions)
    seconds = json.loads((ROOT / "nbs/results/seconds.json").read_text())
    assert all(isinstance(s, int) and 0 < s < 1800 for s in seconds.values())
    assert "vitplast 0." in unions and '<meta content="What one kind' in unions


def test_a_fork_sets_its_links_in_one_line(book):
    assert apparatus.launch("", "experiments/unions") == []
    github = apparatus.launch("https://github.com/you/vitplast", "experiments/unions")
    assert [uri for _, uri in github] == [
        "https://github.com/you/vitplast/blob/main/nbs/experiments/unions.ipynb",
        "https://colab.research.google.com/github/you/vitplast/blob/main/nbs/experiments/unions.ipynb",
    ]
    assert len(apparatus.launch("https://example.org/vitplast", "files")) == 1
    assert "colab" not in (book / "experiments/unions.html").read_text(encoding="utf-8")
