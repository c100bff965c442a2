"""The built wheel, alone in a clean environment, runs the demonstration. Minutes: installs PyTorch once more."""
import json
import subprocess
import sys

import pytest
from test_house import ROOT

import vitplast


@pytest.mark.long
def test_the_wheel_runs_the_demonstration_in_a_clean_environment(tmp_path):
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("vitplast-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, *pip, "install", wheel], check=True)
    installed = json.loads(subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True).stdout)
    assert not {p["name"].lower() for p in installed} & {"nbdev", "jupyter-book", "ray", "transformers", "peft", "lightning", "pytest"}
    every = "import pkgutil, importlib, vitplast\nfor m in pkgutil.walk_packages(vitplast.__path__, 'vitplast.'):\n    m.name.endswith('huggingface') or print(importlib.import_module(m.name).__name__)"
    rooms = subprocess.run([python, "-W", "ignore", "-c", every], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    here = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for p in (ROOT / "vitplast").rglob("*.py")}
    assert here - {"vitplast", "vitplast.models.huggingface"} == set(rooms)
    done = subprocess.run([python.with_name("vitplast"), "demo", "--json", "--out", "out"], cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["facts"]["versions"]["vitplast"] == vitplast.__version__ and len(found["components"]) == 7
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Which parts of formula-vit" in page
