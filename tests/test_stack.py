"""The house: packages stand on each other, arrows point down, and between packages only what a door hands on is imported."""
import ast
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vitplast"
FLOORS = [("files",), ("models",), ("theory",), ("data",), ("training",), ("runs",), ("choosing", "showing"), ("commands",), ("cli",)]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
DOORS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


def room(path) -> str:
    "The package of a module, or the module itself where it stands alone."
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path) -> list:
    "What a module imports of ours, wherever it stands in it: (parts of the module below vitplast, names)."
    inside, found = path.relative_to(ROOT).with_suffix("").parts, []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(tuple(a.name.split(".")), ()) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: -node.level] if node.level else ()
            found.append(((*base, *(node.module or "").split(".")) if node.module else base, tuple(a.name for a in node.names)))
    return [(parts[1:], names) for parts, names in found if parts[:1] == ("vitplast",)]


def arrows() -> Counter:
    "How many imports lead from one room to another."
    return Counter((room(p), target[0]) for p in MODULES if p.parent != PACKAGE or p.stem in FLOOR for target, _ in imports(p) if target and target[0] != room(p) and target[0] != "_door")


def test_every_room_has_its_floor():
    rooms = {room(p) for p in MODULES} - {"__init__", "_door"}
    assert rooms <= set(FLOOR) and {*DOORS, "files", "commands", "cli"} == rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down_and_through_doors(path):
    mine = room(path)
    for target, names in imports(path):
        if target[:1] == ("_door",):
            assert path.name == "__init__.py"
            continue
        assert target, f"{path}: imports the face"
        if target[0] == mine:
            assert len(target) == 2, f"{path}: takes {names} from its own door"
            continue
        assert FLOOR[target[0]] < FLOOR[mine], f"{path}: {mine} stands below {target[0]}"
        assert len(target) == 1, f"{path}: {'.'.join(target)} is behind the door of {target[0]}"
        if target[0] in DOORS:
            assert set(names) <= set(import_module(f"vitplast.{target[0]}").__all__), f"{path}: {names} of {target[0]}"


@pytest.mark.parametrize("name", ["", *DOORS])
def test_a_door_says_what_it_is_for_and_hands_on_what_it_names(name):
    door = import_module(f"vitplast.{name}".rstrip("."))
    assert len(door.__doc__) > 60 and len(set(door.__all__)) == len(door.__all__)
    for exported in door.__all__:
        assert not isinstance(getattr(door, exported), type(sys)), exported
        assert exported in dir(door)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        door.nothing


def run(code) -> str:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_a_function_is_not_hidden_by_its_module_in_any_order():
    "Python binds an imported module to its package; the door keeps the function of that name."
    code = "import vitplast.theory.lipschitz, vitplast.theory.bounds, vitplast.training.finetune\nfrom vitplast.theory import bounds, lipschitz\nimport vitplast as vp\nprint(callable(bounds), callable(lipschitz), callable(vp.training.finetune), callable(vp.bounds), vp.theory.bounds is bounds)"
    assert run(code).split() == ["True"] * 5
    assert run("from vitplast.theory import plasticity, bounds\nfrom vitplast.theory.bounds import KINDS_OF_BOUND\nfrom vitplast.theory import bounds as again\nprint(again is bounds)") == "True\n"


def test_a_door_imports_nothing_until_it_is_asked():
    "So that optional libraries stay optional and the command line answers at once."
    code = "import sys, vitplast, vitplast.models, vitplast.runs, vitplast.cli\nprint([m for m in ('torch', 'timm', 'pandas', 'ray', 'transformers', 'matplotlib') if m in sys.modules])"
    assert run(code) == "[]\n"


def test_the_test_sees_an_arrow_upwards(tmp_path):
    "The reader of imports finds relative, absolute and late ones."
    file = PACKAGE / "theory" / "nothing.py"
    tree = "from ..runs import Store\ndef f():\n    import vitplast.cli\n    from .norms import spreads\nfrom vitplast.data.tasks import task\n"
    seen = []
    original = Path.read_text
    try:
        Path.read_text = lambda self, **kw: tree if self == file else original(self, **kw)
        seen = imports(file)
    finally:
        Path.read_text = original
    assert sorted(seen) == [(("cli",), ()), (("data", "tasks"), ("task",)), (("runs",), ("Store",)), (("theory", "norms"), ("spreads",))]


if __name__ == "__main__":  # the stack in figures
    for names in FLOORS:
        for name in names:
            files = [p for p in MODULES if room(p) == name]
            if files:
                below = ", ".join(f"{to} {n}" for (here, to), n in sorted(arrows().items()) if here == name)
                print(f"{name:10} {len(files):2} files {sum(len(p.read_text().splitlines()) for p in files):5} lines -> {below}")
