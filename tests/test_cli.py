"""The command line as a person meets it."""
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import vitplast as vp
from vitplast.cli import app

COMMAND = [sys.executable, "-m", "vitplast.cli"]


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_help_and_version():
    assert invoke("--version").stdout.strip() == vp.__version__
    assert "Examples" in invoke("demo", "--help").stdout and "--json" in invoke("demo", "--help").stdout
    for name in ("demo", "measure", "pretrain"):
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
        (("--size", "huge"), "size 'huge': expected one of ['tiny', 'small', 'base', 'large']"), (("--snapshots", "half"), "expected shares of the training"),
    ):  # fmt: skip
        result = invoke("pretrain", "--steps", 1, *args)
        assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1


@pytest.mark.long
def test_the_demo_prints_the_same_numbers_twice(tmp_path):
    first, second = (subprocess.run([*COMMAND, "demo", "--json", "--out", str(tmp_path / f)], capture_output=True, text=True, check=True) for f in "ab")
    assert first.stdout == second.stdout
    found = json.loads(first.stdout)
    assert [r["component"] for r in found["components"]][0] in ("MHA", "FC1", "FC2", "LN2", "LN1", "all")
    assert len(found["components"]) == 7 and (tmp_path / "a" / "report.html").stat().st_size > 1e5
