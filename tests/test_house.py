"""The house: modules, notebooks, README and tables of contents in step; what a plain import needs."""
import ast
import html
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (ROOT / "vitplast").rglob("*.py") if not p.name.startswith("_"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not {"_build", ".ipynb_checkpoints"} & set(p.parts))
DEVELOPMENT_ONLY = ("nbdev", "execnb", "fastcore", "IPython", "jupyter_book", "ray", "transformers", "peft", "lightning", "pytest", "nbformat")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def chapters() -> list:
    toc = yaml.safe_load((ROOT / "nbs/_toc.yml").read_text())
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def test_modules_and_notebooks_are_in_step_and_notebooks_are_clean(tmp_path):
    for name in ("nbs", "vitplast", "settings.ini", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "_build")) if source.is_dir() else shutil.copy(source, target)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".py", ".ipynb")}
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True, capture_output=True)
    after = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".py", ".ipynb")}
    assert [str(p) for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)] == [], "run `make export`"


def test_a_notebook_exports_to_the_module_of_its_name():
    modules = set(map(name_of, MODULES))
    exporting = {}
    for path in NOTEBOOKS:
        source = "\n".join("".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code")
        if found := re.search(r"^#\| default_exp ([\w.]+)", source, re.MULTILINE):
            exporting[found[1].replace(".", "/")] = path
    assert set(exporting) == modules and all(path == ROOT / f"nbs/{name}.ipynb" for name, path in exporting.items())
    assert [str(p) for p in MODULES if len(re.sub(r"^# %%.*\n", "", p.read_text(), flags=re.MULTILINE).splitlines()) > (640 if p.stem == "cli" else 500)] == [], "that is two concepts"


def test_code_fits_the_column():
    "The book shows 84 characters of a line of code; `make export` formats to that."
    wide = [(str(p.relative_to(ROOT)), line) for p in NOTEBOOKS for c in read(p)["cells"] if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines() if len(line) > 84 and not line.startswith("#|")]
    assert wide == []


def test_nothing_is_imported_in_vain_or_missing():
    for rules, paths in (("F", ["vitplast", "tests", "tools", "benchmarks"]), ("F401,F821", NOTEBOOKS)):
        command = [Path(sys.executable).with_name("ruff"), "check", "--isolated", "--select", rules, "--extend-exclude", "_modidx.py", *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS])
def test_a_page_is_a_text_with_its_outputs(path):
    cells = read(path)["cells"]
    first = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown" and re.match(r"# .+\n\n> .+", first), "an H1 and one quoted line open a page"
    for cell in cells:
        source = "".join(cell["source"])
        assert not re.search(r"\bTO" + r"DO\b|\bFIX" + r"ME\b", source)
        if cell["cell_type"] == "markdown":
            assert not re.search(r"^(:::|```\{)|\{[a-z]+\}`", source, re.MULTILINE), "only what every viewer shows alike"
            continue
        assert all(o["output_type"] != "error" and o.get("name") != "stderr" for o in cell["outputs"]), "no error, no warning"
        lines = source.strip().splitlines()
        shows = lines and "#| export" not in source and re.match(r"(print|contact_sheet|show_family|depth_lines|against_accuracy|training_curves)\(", lines[-1])
        assert not shows or cell["outputs"], f"no stored output for {lines[-1]!r}"


def test_both_tables_of_contents_list_the_same_pages():
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [quarto[0], *(page for section in quarto[1:] for page in section["contents"])]
    assert [str(Path(p).relative_to("nbs").with_suffix("")) for p in listed] == chapters()
    assert {str(p.relative_to(ROOT / "nbs").with_suffix("")) for p in NOTEBOOKS} <= set(chapters())


def text_of(path) -> str:
    "The markdown of a page."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n".join("".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "markdown")


def test_links_between_pages_and_citations_resolve():
    for path in [*NOTEBOOKS, ROOT / "README.md", ROOT / "nbs/references.md"]:
        text = text_of(path)
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            linked = path.parent / file
            assert linked.exists(), f"{path.name}: {target}"
            headings = re.findall(r"^#+ (.+)$", text_of(linked), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, f"{path.name}: {target}"


OPTIONAL = {"models/huggingface": "text_requirements", "runs/executors": "ray_requirements", "models/focus": "real_requirements", "choosing/export": "peft_requirements", "choosing/callbacks": "lightning_requirements text_requirements", "training/updates": "peft_requirements", "models/language": "text_requirements"}  # module -> the extras that some of it needs


def name_of(path) -> str:
    "A module as its page is called: models/components."
    return str(path.relative_to(ROOT / "vitplast").with_suffix(""))


def test_import_needs_no_development_tool():
    block = f"import sys\nfor name in {DEVELOPMENT_ONLY!r}: sys.modules[name] = None\n"
    modules = ", ".join(f"vitplast.{name.replace('/', '.')}" for name in map(name_of, MODULES) if name != "models/huggingface")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"{block}import {modules}"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-600:]


def test_modules_import_only_what_the_package_requires():
    settings = (ROOT / "settings.ini").read_text()
    declared = {k: re.split(r"[<>=]+[^ ]+ ?| ", re.search(rf"^{k} = (.+)$", settings, re.MULTILINE)[1]) for k in ("requirements", *" ".join(OPTIONAL.values()).split())}
    always = {*declared["requirements"], "sklearn", "PIL", "yaml", "vitplast", *sys.stdlib_module_names}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            extras = {n for extra in OPTIONAL.get(name_of(path), "").split() for n in declared[extra]}
            assert {n.split(".")[0] for n in names} <= always | extras, f"{path.name}: {names}"


def test_the_public_face_is_functions_where_modules_share_their_names():
    import vitplast as vp

    for name in ("bounds", "components", "finetune", "linear_probe", "load", "plasticity", "task"):
        assert callable(getattr(vp, name)) and getattr(vp, name).__doc__, name


def test_the_readme_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert 9 <= len([line for line in example.splitlines() if line.strip()]) <= 11
    exec(example, {})
    out = capsys.readouterr().out
    assert re.search(r"MHA +\d", out) and re.search(r"attention alone: \d\d\.\d%, linear probe: \d\d\.\d%", out)


def test_the_readme_shows_the_stored_demonstration():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figure = (ROOT / "nbs/results/demo/accuracy.svg").read_text()
    assert figure.startswith("<svg")


def test_no_placeholder_is_left():
    for path in (*NOTEBOOKS, ROOT / "README.md", ROOT / "nbs/references.md"):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join("".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "markdown")
        assert not re.search(r"(?<!\$)\b[A-Z]{3,}_[A-Z]{3,}\b(?!_)", re.sub(r"`.*?`|^    .*$|```.*?```", "", text, flags=re.MULTILINE | re.DOTALL)), path


def test_no_merge_is_half_done():
    texts = [p for p in (*ROOT.glob("*.*"), *(p for d in ("nbs", "vitplast", "tests", "tools") for p in (ROOT / d).rglob("*"))) if p.suffix in (".md", ".py", ".ipynb", ".txt", ".yml", ".toml", ".ini", ".cff")]
    assert len(texts) > 200 and [str(p) for p in texts if re.search(r'^\s*"?(<{7}|>{7})( |\Z)', p.read_text(encoding="utf-8"), re.MULTILINE)] == []


def test_version_is_one():
    import vitplast

    for file, pattern in (("settings.ini", r"^version = (.+)$"), ("CITATION.cff", r"^version: (.+)$"), ("nbs/references.md", r"^  version = \{(.+)\},$")):
        assert re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1] == vitplast.__version__


def test_the_reference_is_that_of_the_code(monkeypatch):
    "The signatures and docstrings in the API reference, and every module that there is, are those of the package as it is now."
    import vitplast

    monkeypatch.chdir(ROOT / "nbs")
    space = {}
    for cell in read(ROOT / "nbs/api.ipynb")["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(body, []), "api", "exec"), space)
            if not cell["outputs"]:
                exec(compile(ast.Module([last], []), "api", "exec"), space)
                continue
            shown = eval(compile(ast.Expression(last.value), "api", "eval"), space).data
            assert "".join(cell["outputs"][0]["data"]["text/markdown"]) == shown, "run `python tools/reproduce.py nbs/api.ipynb`"
    assert all(f"vitplast.{name_of(p).replace('/', '.')}" in shown for p in MODULES)
    assert set(space["faces"]) == set(vitplast.__all__)


def page_functions() -> dict:
    "What the first code cell of the API reference defines."
    space, cells = {}, read(ROOT / "nbs/api.ipynb")["cells"]
    exec(next("".join(c["source"]) for c in cells if c["cell_type"] == "code"), space)
    return space


def test_a_public_docstring_lists_every_parameter():
    "One summary line; under Args (of a class also Attributes) every parameter, in the order of the signature, and nothing else."
    page, unlisted = page_functions(), []
    for name, thing in page["faces"].items():
        sections = page["sections"](thing.__doc__)
        listed = [n for line, *_ in page["entries"](sections.get("Args", sections.get("Attributes", ""))) for n in page["names_of"](line)]
        given = [str(p.replace(default=p.empty, annotation=p.empty)) for p in inspect.signature(thing).parameters.values()]
        if listed != given or "\n" in sections[""].split("\n\n")[0]:
            unlisted.append(name)
    assert unlisted == []


def test_the_reference_shows_docstrings_as_they_are():
    "Neither a star nor a bar, bracket or underscore becomes markup."
    page = page_functions()
    for text in ("a|b **c** _d_ <e> [f](g) $h$ ~i~ j\\*k", *(t.__doc__ for t in page["faces"].values())):
        shown = re.sub(r"<[^>]+>", "", MarkdownIt().render(page["plain"](text)))
        assert html.unescape(shown).strip() == " ".join(text.replace("`", "").split())


def test_the_first_page_shows_what_the_experiments_ended_with():
    shown = json.dumps(read(ROOT / "nbs/index.ipynb")["cells"], ensure_ascii=False)
    sentences = {p.stem: p.read_text(encoding="utf-8").strip() for p in (ROOT / "nbs/results/headlines").glob("*.txt")}
    assert len(sentences) == 15 and all(json.dumps(s, ensure_ascii=False)[1:-1] in shown for s in sentences.values())
    for name, sentence in sentences.items():
        page = json.dumps([c.get("outputs") for c in read(ROOT / f"nbs/experiments/{name}.ipynb")["cells"]], ensure_ascii=False)
        assert sentence.replace("'", "") in page.replace("\\'", "").replace("'", ""), f"{name}: the page and its headline disagree"
