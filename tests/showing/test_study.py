"""The study: selection on validation by hand, nothing computed twice, stopped and taken up."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitplast.runs import best_rates, rank_correlation
from vitplast.runs.executors import compute
from vitplast.showing import (
    Study, StudyConfig, display_frame, findings, report_html, study, summary, text_table,
)

SCRIPT = """
import os, sys
from vitplast.showing import StudyConfig, study
if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # two workers on any machine, so that the grid is not over at once
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    study(StudyConfig("formula-vit-tiny", selections=("head", "LN1", "MHA"), lrs=(0.01, 0.03), seeds=(0,), steps=int(sys.argv[2]), pairs=8), sys.argv[1])
"""


def made_up() -> Study:
    "Two components, two rates, two seeds, numbers chosen so that validation and test disagree about the rate."
    rows = []
    for name, lr, seed, validation, test in [
        ("MHA", 0.1, 0, 0.9, 0.5), ("MHA", 0.1, 1, 0.7, 0.7), ("MHA", 0.2, 0, 0.7, 0.9), ("MHA", 0.2, 1, 0.8, 0.9),
        ("LN1", 0.1, 0, 0.5, 0.4), ("LN1", 0.1, 1, 0.5, 0.4), ("LN1", 0.2, 0, 0.6, 0.3), ("LN1", 0.2, 1, 0.6, 0.5),
        ("head", 0.1, 0, 0.2, 0.2), ("head", 0.1, 1, 0.2, 0.2),
    ]:  # fmt: skip
        rows.append({"model": "formula-vit", "task": "digits", "optimizer": "sgd", "steps": 20, "component": name, "lr": lr, "seed": seed, "best_step": 1, "validation_accuracy": validation, "test_accuracy": test, "diverged": False, "grad_norm": 2.0 if name != "head" else np.nan, "n_trained": 10})
    cells = [(i, b, c) for i in ("embedding", "native") for b in (0, 1) for c in ("LN1", "MHA")]
    value = {"LN1": 0.5, "MHA": 2.0}
    plastic = pd.DataFrame([{"block": b, "depth": float(b), "component": c, "inputs": i, "plasticity": value[c] + b, "ci_low": 0.1, "ci_high": 9.0, "max_ratio": value[c] + b + 1, "n_pairs": 4, "zero_pairs": 0} for i, b, c in cells])
    bound = pd.DataFrame([{"block": b, "depth": float(b), "component": c, "kind": k, "inputs": i, "bound": s * (value[c] + b + 1), "radius": np.nan, "sigma": np.nan, "n_tokens": None, "proven": c == "LN1" or k == "hull"} for i, b, c in cells for k, s in (("published", 8), ("hull", 4))])
    runs = pd.DataFrame(rows)
    curves = pd.DataFrame([{"step": s, "loss": 1.0, "grad_norm": 1.0, "validation_accuracy": 0.5, "component": c, "lr": 0.1, "seed": 0} for c in ("LN1", "MHA", "head") for s in (10, 20)])
    facts = {"model": "formula-vit", "task": "digits", "pairs": 4, "steps": 20, "lrs": [0.1, 0.2], "seeds": [0, 1], "classes": 10, "train": 1, "validation": 1, "test": 100, "test_sources": 25, "linear_probe": 0.3, "hardware": "a CPU", "versions": {"torch": "x"}}
    return Study(plastic, bound, runs, curves, facts)


def test_the_rate_is_chosen_on_validation_and_never_on_test():
    s = made_up()
    assert best_rates(s.runs).droplevel(["model", "optimizer", "task"]).to_dict() == {"LN1": 0.2, "MHA": 0.1, "head": 0.1}
    table = summary(s).set_index("component")
    assert table.test_accuracies["MHA"] == [0.5, 0.7] and np.isclose(table.test_accuracy["MHA"], 0.6)  # 0.9 at the other rate
    assert list(table.index) == ["MHA", "LN1", "head"]
    assert np.isclose(table.plasticity["MHA"], 2.5) and table.low_block["MHA"] == 2 and table.high_block["MHA"] == 3
    assert np.isclose(table.bound["LN1"], 8) and np.isclose(table.tightness["LN1"], 4) and np.isclose(table.published["LN1"], 16)


def test_the_table_and_the_sentences_say_the_same():
    s = made_up()
    shown = display_frame(s).set_index("component")
    assert shown["test accuracy"]["MHA"] == "60.0 ± 14.1" and shown["over head"]["MHA"] == "+40.0" and shown["bound"]["MHA"] == "14" and shown["published"]["MHA"] == "28*" and shown["published"]["LN1"] == "16"
    assert shown["plasticity"]["LN1"] == "1.00 (0.50-1.50)" and shown["gradient"]["head"] == ""
    text = " ".join(findings(s))
    assert "MHA > LN1" in text and "MHA is best alone, 20.0 points before LN1" in text and "linear probe 30.0%" not in text  # no `all` here
    assert len({len(line) for line in text_table(display_frame(s)).splitlines()}) == 1
    assert "on 25 independent test images is about 13.9 points: the two cannot be told apart" in text  # sqrt((.6 * .4 + .4 * .6) / 25)


def test_the_p_value_counts_the_orders():
    values = [3, 1, 2, 5, 4]
    table = pd.DataFrame({"task": "a", "component": ["LN1", "MHA", "LN2", "FC1", "FC2"], "plasticity": values, "test_accuracy": values})
    found = rank_correlation(table)
    assert (found.mean, found.p) == pytest.approx((1, 2 / 120)) and np.isnan(found.ci_low)
    table["test_accuracy"] = [3, 1, 2, 4, 5]  # one exchange of neighbours: rho = 0.9, and 5 orders each way are as extreme
    assert rank_correlation(table)[::3] == pytest.approx((0.9, 10 / 120))


def test_a_saved_study_is_the_same_study(tmp_path):
    s = made_up()
    s.save(tmp_path)
    again = Study.load(tmp_path)
    assert text_table(display_frame(again)) == text_table(display_frame(s)) and again.facts == s.facts


def test_the_report_is_one_file_without_requests():
    page = report_html(made_up())
    sources = re.findall(r'(?:src|href|data)="([^"#][^"]{0,30})', page)
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not re.search(r"<script|<link|@import|url\(\s*['\"]?http", page)
    assert page.count("<img") == page.count("alt=") == 2 and page.count("<svg") == page.count("aria-label=") == 3


def script(tmp_path, steps):
    (tmp_path / "go.py").write_text(SCRIPT)
    return [sys.executable, str(tmp_path / "go.py"), str(tmp_path / "out"), str(steps)]


def test_ctrl_c_keeps_what_was_finished_and_a_rerun_computes_only_the_rest(tmp_path):
    command, runs = script(tmp_path, 15), tmp_path / "out" / "runs"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(list(runs.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=100) != 0
    kept = {f.name: f.stat().st_mtime_ns for f in runs.glob("*.json")}
    assert 2 <= len(kept) < 6
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    after = {f.name: f.stat().st_mtime_ns for f in runs.glob("*.json")}
    assert len(after) == 6 and kept.items() <= after.items()
    records = {json.loads(f.read_text())["sha256"] for f in runs.glob("*.json")}
    run = StudyConfig("formula-vit-tiny", selections=("MHA",), lrs=(0.03,), seeds=(0,), steps=15).grid().runs()[0]
    [(kind, alone)] = compute([run])  # in this process, undisturbed
    stored = [r for f in runs.glob("*.json") if (r := json.loads(f.read_text())["record"])["components"] == "MHA" and r["config"] == alone["config"]]
    assert kind == "record" and len(records) == 6 and len(stored) == 1
    assert {k: v for k, v in stored[0].items() if k not in ("seconds", "peak_memory", "device")} == {k: v for k, v in alone.items() if k not in ("seconds", "peak_memory", "device")}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_kill_9_loses_the_runs_in_flight_alone_and_leaves_no_worker_behind(tmp_path):
    command, runs = script(tmp_path, 15), tmp_path / "out" / "runs"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(runs.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while alive := [c for c in children if Path(f"/proc/{c}").exists() and "\nState:\tZ" not in Path(f"/proc/{c}/status").read_text()]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)
    assert len(children) >= 2
    assert all(json.loads(f.read_text())["sha256"] for f in runs.glob("*.json"))


def test_a_best_rate_on_the_edge_asks_for_further_ones(tmp_path):
    config = StudyConfig("formula-vit-tiny", selections=("head",), lrs=(0.002, 0.004), seeds=(0,), steps=30, pairs=8, extend=True)
    s = study(config, tmp_path / "out", progress=False)
    [best] = best_rates(s.runs)
    assert len(s.runs) > 2 and best > 0.004 and s.facts["lrs"] == sorted(s.runs.lr)  # so small a rate teaches nothing
    assert set(s.curves.lr) == {best} and len(s.curves) > 0
