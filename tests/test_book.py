"""The book builds from stored outputs, and what it shows is what a reader should see."""
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import Browser
from test_house import chapters


class Page(HTMLParser):
    "What a page loads, what it shows, and its pictures."
    def __init__(self, path):
        super().__init__()
        self.loads, self.pictures, self.text, self.math, self._skip, self._math = [], [], [], [], 0, 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.pictures.append(attrs)
        if tag in ("script", "img", "iframe", "source", "object") and attrs.get("src", attrs.get("data")):
            self.loads.append(attrs.get("src", attrs.get("data")))
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "dns-prefetch"):
            self.loads.append(attrs["href"])
        self._skip += tag in ("script", "style")
        if self._math or (tag in ("span", "div") and "math" in attrs.get("class", "").split()):
            self._math += tag in ("span", "div")

    def handle_endtag(self, tag):
        self._skip -= tag in ("script", "style")
        self._math -= bool(self._math) and tag in ("span", "div")

    def handle_data(self, data):
        if not self._skip:
            (self.math if self._math else self.text).append(data)


@pytest.mark.parametrize("chapter", chapters())
def test_a_page(book, chapter):
    path = book / f"{chapter}.html"
    assert path.exists(), "a page of _toc.yml is not in the book"
    page = Page(path)
    assert "unpkg" not in path.read_text(encoding="utf-8") and "cdn" not in "".join(page.loads)
    assert [u for u in page.loads if re.match(r"(https?:)?//", u)] == [], "a page must open without a network"
    for url in page.loads:
        assert url.startswith("data:") or (path.parent / url.split("?")[0]).exists(), url
    shown = "".join(page.text)
    assert "#|" not in shown and "```{" not in shown and ":::" not in shown
    prose = re.sub(r"<pre.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = re.search(r"<article.*?</article>", prose, re.DOTALL)[0]
    body = re.sub(r'<(span|div) class="math[^>]*>.*?</\1>', "", body, flags=re.DOTALL)
    assert not re.search(r"\$\$|\\(frac|lVert|mathbb|sum)\b", body), "a formula that nothing will render"
    assert all(p.get("alt", "").strip() for p in page.pictures if "logo" not in p.get("class", ""))


def test_formulas_have_a_local_script_that_runs_after_its_configuration(book):
    html = (book / "theory" / "plasticity.html").read_text()
    (script,) = re.findall(r"<script([^>]*mathjax[^>]*)>", html)
    assert "defer" in script  # else the configuration that follows it would replace MathJax
    source = re.search(r'src="([^"?]*)', script)[1]
    assert (book / "theory" / source).stat().st_size > 1e6 and 'class="math' in html


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromium"):
        pytest.skip("needs Debian's chromium")
    with Browser() as opened:
        yield opened


def resolves(link, ids={}) -> bool:
    "Whether a link leads to a file of the book, and to a place in it."
    parts = urlsplit(link)
    path = Path(unquote(parts.path))
    if not parts.fragment or path.suffix != ".html":
        return path.is_file()
    if path not in ids:
        ids[path] = set(re.findall(r'id="([^"]+)"', path.read_text(encoding="utf-8")))
    return unquote(parts.fragment) in ids[path] | {"top"}


@pytest.mark.parametrize("chapter", chapters())
def test_a_page_in_a_browser_without_a_network(book, browser, chapter):
    widths = (1300, 390)  # a desk and a phone
    for width, page in zip(widths, browser.open(f"file://{book}/{chapter}.html", widths)):
        assert page["complaints"] == [], "a failed request, an exception or an error on the console"
        assert page["formulas"] == page["rendered"] == (book / f"{chapter}.html").read_text(encoding="utf-8").count('class="math') and page["broken"] == 0
        assert all(p["alt"].strip() and p["wide"] > 0 for p in page["pictures"])
        assert page["wide"] <= width and page["cut"] == [], "the page is wider than the screen, or what is on it"
        assert width < 1000 or page["scrolls"] == [], "code, tables and formulas fit the column of a desk"
        inside = [u for u in page["links"] if u.startswith("file:")]
        assert len(inside) > 40 and [u for u in inside if not resolves(u)] == []


def test_the_search_finds_pages_without_a_network(book, browser):
    browser.open(f"file://{book}/search.html?q=hull", wait="document.querySelectorAll('#search-results li').length > 2")


def test_the_browser_notices_what_is_wrong(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text('<title>bad</title><article><img src="nope.png"><img src="https://example.com/x.png"></article><script>console.error("boom"); nothing()</script>')
    [page] = browser.open(f"file://{bad}")
    told = " ".join(page["complaints"])
    assert all(word in told for word in ("ERR_FILE_NOT_FOUND", "asks for https://example.com/x.png", "boom", "nothing is not defined"))
    wide = tmp_path / "wide.html"
    wide.write_text(f'<title>wide</title><article style="width: 300px"><pre>{"x" * 400}</pre><pre style="overflow-x: auto">{"y" * 400}</pre><div style="overflow: hidden"><table><tr><td>{"z" * 400}</table></div><pre>short</pre></article>')
    [found] = browser.open(f"file://{wide}")
    assert [c[:5] for c in found["cut"]] == ["PRE x", "TABLE"] and [c[:5] for c in found["scrolls"]] == ["PRE y"]
    assert [p["wide"] for p in page["pictures"]] == [0, 0] and not resolves(f"file://{tmp_path}/none.html") and not resolves(f"file://{bad}#none")
