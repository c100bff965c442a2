"""The pages of the theory run: every proof's sympy check holds, and fails on its wrong variant."""
import ast
import json
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient
from test_house import ROOT, chapters

THEORY = sorted((ROOT / "nbs/theory").glob("*.ipynb"))
QUICK = ("norms", "linear", "attention")  # the proofs; the other pages measure


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.long) for p in THEORY])
def test_a_page_of_the_theory_runs(page):
    notebook = nbformat.read(page, as_version=4)
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(page.parent)}})
    client.execute(env=environment)


@pytest.mark.parametrize("page", [p for p in THEORY if p.stem != "bounds"], ids=lambda p: p.stem)
def test_every_symbolic_check_stands_beside_a_wrong_variant(page):
    code = ["".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "code"]
    checks = [c for c in code if "sp." in c and "assert" in c]
    assert checks and all(re.search(r"!=|\bnot\b|== holds", "\n".join(ast.unparse(n) for n in ast.walk(ast.parse(c)) if isinstance(n, ast.Assert))) for c in checks)


def test_theorems_are_numbered_in_the_order_of_the_book():
    texts = ["\n".join("".join(c["source"]) for c in json.loads((ROOT / f"nbs/{c}.ipynb").read_text())["cells"] if c["cell_type"] == "markdown")
             for c in chapters() if c.startswith("theory/") and c != "theory/symbols"]  # fmt: skip
    numbers = [int(n) for text in texts for n in re.findall(r"^> \*\*Theorem (\d+) \(", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(text.count("> **Theorem") <= text.count("*Proof.*") == text.count("$\\square$") for text in texts)
    listed = (ROOT / "nbs/theory/symbols.md").read_text()
    assert any(f"{before} {numbers[-1]} " in listed for before in ("and", "to", "|"))
