"""The command line as a person meets it."""
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import vitplast as vp
from vitplast.cli import app
from vitplast.data import measure

COMMAND = [sys.executable, "-m", "vitplast.cli"]


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_help_and_version():
    assert invoke("--version").stdout.strip() == vp.__version__
    assert "Examples" in invoke("demo", "--help").stdout and "--json" in invoke("demo", "--help").stdout
    for name in ("demo", "measure", "sweep", "pretrain"):
        assert name in invoke("--help").stdout


def test_pretraining_is_taken_up_and_gives_a_model_that_loads(tmp_path):
    out = tmp_path / "small.safetensors"
    result = invoke("pretrain", "--size", "tiny", "--steps", 2, "--snapshots", "0.5", "--probes", 1, "--out", out, "--device", "cpu", "--threads", 1)
    assert result.exit_code == 0, result.output
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["steps"] == 2 and card["pretraining"]["images"] == 128 and card["pretraining"]["vit"]["width"] == 64
    assert vp.load(tmp_path / "small-0k.safetensors").embed_dim == 64
    assert abs(vp.linear_probe(vp.load(out), vp.task("digits")) - card["linear_probe"]["pretrained"]) < 1e-9
    again = invoke("pretrain", "--size", "tiny", "--steps", 4, "--out", out, "--device", "cpu")
    assert again.exit_code == 1 and "another pretraining" in again.output and "Traceback" not in again.output


def test_errors_are_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    result = subprocess.run([*COMMAND, "demo", "--out", str(tmp_path / "taken")], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "vitplast:" in result.stderr.splitlines()[-1]
    assert result.stderr.count("\n") == 1
    assert invoke("demo", "--seed", -1).exit_code == 2
    for args, message in (
        (("--device", "gpu"), "device 'gpu': expected one of"), (("--out", tmp_path / "x"), "expected a name that ends in .safetensors"),
        (("--size", "huge"), "unknown size 'huge'; nearest known: ["), (("--snapshots", "half"), "expected shares of the training"),
    ):  # fmt: skip
        result = invoke("pretrain", "--steps", 1, *args)
        assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1


PLAN = {"tasks": ["digits"], "models": ["formula-vit-tiny"], "selections": ["LN1", "head"], "lrs": [0.1, 0.3], "seeds": [0, 1], "config": {"steps": 2, "eval_every": 2}}


def test_a_sweep_says_what_it_will_do_does_it_and_shows_it(tmp_path):
    plan, store = tmp_path / "plan.json", tmp_path / "store"
    plan.write_text(json.dumps(PLAN))
    command = ("sweep", plan, "--store", store, "--executor", "serial")
    dry = invoke(*command, "--dry-run")
    assert dry.exit_code == 0 and dry.stdout.count("open  formula-vit-tiny digits") == 8 and not list(store.glob("*.json"))
    assert re.search(r"^8 runs, 0 done, about \d+ (s|min) left \(one process, CPU, one by one\)$", dry.stdout, re.MULTILINE)
    done = invoke(*command)
    assert done.exit_code == 0 and len(list(store.glob("*.json"))) == 9 and "8 runs, 0 diverged, 0 failed" in done.output
    probe = vp.linear_probe(vp.load("formula-vit-tiny"), vp.task("digits"))
    row = re.search(r"^digits +([0-9.]+) +([0-9.]+) +([0-9.]+)$", done.stdout, re.MULTILINE)
    assert row and float(row[3]) == round(100 * probe, 1) and "rates chosen on validation" in done.stdout
    runs = pd.DataFrame(json.loads(invoke(*command, "--json", "--compact").stdout)["runs"])
    assert sorted(f.name for f in store.iterdir() if f.name[0] != ".") == ["runs.jsonl"]
    for column, name in ((1, "LN1"), (2, "head")):
        mine = runs[runs.component == name].groupby("lr")[["validation_accuracy", "test_accuracy"]].mean()
        assert float(row[column]) == pytest.approx(100 * mine.test_accuracy[mine.validation_accuracy.idxmax()], abs=0.051)
    after = json.loads(invoke(*command, "--dry-run", "--json").stdout)
    assert (after["runs"], after["done"], after["seconds_left"]) == (8, 8, 0) and {d["done"] for d in after["list"]} == {True}
    assert "rates chosen on test" in invoke(*command, "--selection", "test").stdout


def test_a_sweep_with_failures_shows_the_rest(tmp_path):
    (tmp_path / "no-images").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"tasks": ["digits", str(tmp_path / "no-images")], "lrs": [0.1]}))
    result = invoke("sweep", tmp_path / "plan.json", "--store", tmp_path / "s", "--executor", "serial")
    assert result.exit_code == 1 and "4 runs, 0 diverged, 4 failed" in result.output and re.search(r"^digits +[0-9]", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("args, message", [
    (("papre",), "unknown preset or file 'papre'; nearest known: ['paper'"),
    (("missing.json",), "missing.json"),
    (("offline-cpu", "--executor", "gpu"), "unknown executor 'gpu'"),
    (("offline-cpu", "--selection", "train"), "'train'"),
], ids=str)  # fmt: skip
def test_what_a_sweep_refuses(tmp_path, args, message):
    result = invoke("sweep", *args, "--store", tmp_path / "s", "--dry-run")
    assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1


@pytest.mark.long
def test_the_demo_prints_the_same_numbers_twice(tmp_path):
    first, second = (subprocess.run([*COMMAND, "demo", "--json", "--out", str(tmp_path / f)], capture_output=True, text=True, check=True) for f in "ab")
    assert first.stdout == second.stdout
    found = json.loads(first.stdout)
    assert [r["component"] for r in found["components"]][0] in ("MHA", "FC1", "FC2", "LN2", "LN1", "all")
    assert len(found["components"]) == 7 and (tmp_path / "a" / "report.html").stat().st_size > 1e5


def test_branches_are_measured_as_in_python(tmp_path):
    out = tmp_path / "branches.csv"
    result = invoke("measure", "formula-vit-tiny", "--of", "branch", "--n", 8, "--out", out, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    expected = measure("formula-vit-tiny", "digits", n=8, of="branch", batch_size=32)
    for column in ("plasticity", "share", "cosine"):
        np.testing.assert_allclose(pd.read_csv(out)[column], expected[column], rtol=1e-4)
    assert "cosine" in out.with_suffix(".svg").read_text()
    out.unlink()
    assert f"--out {out.with_suffix('.svg')}: exists" in invoke("measure", "formula-vit-tiny", "--n", 8, "--out", out).output and not out.exists()
    for args, message in ((("--of", "branches"), "--of 'branches': expected component or branch"), (("--of", "branch", "--inputs", "both"), "expected one of ('native',) with --of branch")):
        result = invoke("measure", "formula-vit-tiny", *args, "--out", tmp_path / "other.csv")
        assert result.exit_code == 1 and message in result.output
