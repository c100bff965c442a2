"""Sweeps are killed, doubled, starved of disk, fed with damage and with runs that raise; the store ends as if nothing had happened."""
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vitplast as vp
from vitplast.data import folder_contents
from vitplast.runs import (
    Grid, Store, best_rates, choose, curve_frame, in_words, materials, probe_frame,
    run_frame, seconds_left, size_of, stored_runs, sweep,
)
from vitplast.runs import executors
from vitplast.runs.estimates import READ, arithmetic
from vitplast.runs.sweep import Sweep

CONFIG = vp.FinetuneConfig(steps=3, eval_every=2, batch_size=8)
GRID = Grid(("digits",), models=("formula-vit-tiny",), selections=("LN1", "MHA"), lrs=(0.03, 0.3), seeds=(0, 1), config=CONFIG)
INCIDENTAL = ("seconds", "peak_memory", "device", "together")
PRELUDE = f"""
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import vitplast as vp
from vitplast.runs import Grid, Store, sweep
GRID = {GRID!r}
GRID = Grid(**vars(GRID) | {{"lrs": (0.01, 0.03, 0.1, 0.3), "seeds": (0, 1, 2)}})
torch.set_num_threads(1)
""".replace("FinetuneConfig(", "vp.FinetuneConfig(")


def contents(store) -> dict:
    "All records by key, without what depends on the moment."
    return {k: {n: v for n, v in r.items() if n not in INCIDENTAL} for k, r in Store(store).records().items()}


def run_script(tmp_path, text, *args, wrap=()):
    (tmp_path / "go.py").write_text(PRELUDE + text)
    done = subprocess.run([*wrap, sys.executable, tmp_path / "go.py", *map(str, args)], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return sweep(GRID, folder, "serial", progress=False), contents(folder)


KILLED = """
if __name__ == "__main__":
    reference, store, chance, times = sys.argv[1], Path(sys.argv[2]), random.Random(int(sys.argv[3])), int(sys.argv[4])
    started = time.monotonic()
    sweep(GRID, reference, "serial", progress=False)
    pace = (time.monotonic() - started) / len(GRID.runs())

    def killed(executor, wait):
        child = os.fork()
        if not child:
            sweep(GRID, store, executor, 2 if executor == "processes" else None, progress=False)
            os._exit(0)
        wait()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(len(Store(store)), flush=True)

    def new_record():
        before, deadline = len(list(store.glob("*.json"))), time.monotonic() + 60
        while len(list(store.glob("*.json"))) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, pace))

    for executor in 4 * times * ["serial"] + 3 * times * ["batched"]:
        killed(executor, lambda: time.sleep(chance.uniform(0, 2 * pace)))
    for _ in range(3 * times):
        killed("processes", new_record)
    frame = sweep(GRID, store, "serial", progress=False)
    print(len(frame))
"""


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ten_or_twenty_kills_at_random_moments(tmp_path, times):
    seed = random.randrange(10**6)
    found = list(map(int, run_script(tmp_path, KILLED, tmp_path / "reference", tmp_path / "store", seed, times).split()))
    assert len(found) == 10 * times + 1 and found == sorted(found) and found[-1] == 24, f"seed {seed}"
    assert found[0] < found[-2] and found[7 * times - 1] < 24, f"the kills did not come in the middle: {found}, seed {seed}"
    store, reference = contents(tmp_path / "store"), contents(tmp_path / "reference")
    assert store.keys() == reference.keys() and len(store) == 24, f"seed {seed}"
    for name, record in store.items():  # groups trained as one computation round differently in float32
        same = record == reference[name] or Store(tmp_path / "store").records()[name]["together"] > 1
        assert same and close(record, reference[name]), f"seed {seed}"
    assert not list((tmp_path / "store").glob("*.damaged")) and not list((tmp_path / "store").glob("*.failed"))


def close(a, b) -> bool:
    "Whether two records are of the same run, with histories that agree in five digits."
    histories = [np.array([np.nan if v is None else v for column in ("loss", "grad_norm") for v in r["history"][column]]) for r in (a, b)]
    settled = [{k: v for k, v in r.items() if k not in ("history", "validation_accuracy", "test_accuracy", "best_step")} for r in (a, b)]
    return settled[0] == settled[1] and np.allclose(*histories, rtol=1e-5, equal_nan=True) and abs(a["test_accuracy"] - b["test_accuracy"]) < 0.01


TWO = """
if __name__ == "__main__":
    store, log = sys.argv[1:3]
    put = Store.put
    def noted(self, config, record):
        put(self, config, record)
        with open(log, "a") as f:
            f.write(f"{os.getpid()} {self.path(config).stem}\\n")
    Store.put = noted
    children = []
    for _ in range(2):
        children.append(os.fork())
        if not children[-1]:
            os._exit(len(sweep(GRID, store, "serial", progress=False)))
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_two_processes_share_the_runs_and_both_return_all(tmp_path):
    assert run_script(tmp_path, TWO, tmp_path / "store", tmp_path / "log").split() == ["24", "24"]
    done = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(done) == len({name for _, name in done}) == 24 and len({pid for pid, _ in done}) == 2
    assert not list((tmp_path / "store").glob(".*.lock"))


FULL = """
if __name__ == "__main__":
    disk, out = Path(sys.argv[1]), sys.argv[2]
    small = Grid(**vars(GRID) | {"lrs": (0.03, 0.3), "seeds": (0, 1)})
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(80_000))
    try:
        sweep(small, disk / "store", "serial", progress=False)
    except OSError as error:
        print(error.errno, len(Store(disk / "store")), len(list((disk / "store").glob(".*.json.*"))))
    ballast.unlink()
    sweep(small, disk / "store", "serial", progress=False)
    shutil.copytree(disk / "store", out)
"""


def test_a_full_disk(tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=96k tmpfs {disk} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("needs a Linux that lets its users mount a tmpfs")
    errno, kept, leftovers = map(int, run_script(tmp_path, FULL, disk, tmp_path / "out", wrap=mount).split())
    assert errno == 28 and 0 < kept < 8 and leftovers == 0  # ENOSPC; what was finished is there, whole
    assert contents(tmp_path / "out") == undisturbed[1]


def test_damage_is_named_and_computed_again(tmp_path, undisturbed):
    store = Store(tmp_path)
    sweep(GRID, store, "serial", progress=False)
    for damage, path in zip((cut, edited), sorted(tmp_path.glob("*.json"))):
        damage(path)
    with pytest.warns(UserWarning, match="damaged record") as noted:
        again = sweep(GRID, store, "serial", progress=False)
    assert len(noted) == 2 and len(again) == 8 and contents(tmp_path) == undisturbed[1]
    lines = store.compact().read_text().splitlines()
    lines[3] = lines[3].replace('"lr": 0.', '"lr": 0.1', 1)
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:200]]))
    with pytest.warns(UserWarning, match="line [48]: damaged record") as noted:
        again = sweep(GRID, Store(tmp_path), "serial", progress=False)
    assert len(noted) == 2 and len(again) == 8
    with pytest.warns(UserWarning, match="damaged record"):
        assert contents(tmp_path) == undisturbed[1]


def cut(path):
    path.write_text(path.read_text()[:-100])


def edited(path):
    text = path.read_text()
    path.write_text(text.replace('"test_accuracy": 0.', '"test_accuracy": 0.9'))


def test_a_store_is_merged_by_copying(tmp_path, undisturbed):
    for name, seed in (("a", 0), ("b", 1)):
        sweep(replace(GRID, seeds=(seed,)), tmp_path / name, "serial", progress=False)
    Store(tmp_path / "b").compact().rename(tmp_path / "a" / "from-b.jsonl")
    frame = sweep(GRID, tmp_path / "a", "serial", progress=False)
    assert contents(tmp_path / "a") == undisturbed[1]
    assert frame.drop(columns=["seconds"]).equals(undisturbed[0].drop(columns=["seconds"]))


def test_a_rate_that_diverges_is_recorded_and_ranked_last(tmp_path):
    from vitplast.runs import best_rates, summarise

    grid = replace(GRID, lrs=(1e20, 0.03), config=replace(CONFIG, warmup=0.0))
    frame = sweep(grid, tmp_path, "serial", progress=False)
    assert frame[frame.lr == 1e20].diverged.all() and not frame[frame.lr == 0.03].diverged.any()
    assert best_rates(frame).eq(0.03).all() and summarise(frame).n_diverged.eq(2).all()
    together = sweep(grid, tmp_path / "b", "batched", progress=False)
    assert together.diverged.tolist() == frame.diverged.tolist() and len(json.loads(json.dumps(contents(tmp_path / "b")))) == 8


def test_a_run_that_raises_is_noted_and_the_others_go_on(tmp_path, monkeypatch, undisturbed):
    def broken(model, task, what, config, **kwargs):
        if (what, config.seed) == ("MHA", 1):
            raise RuntimeError("the image of a cat")
        return vp.finetune(model, task, what, config, **kwargs)

    def broken_together(model, task, what, configs, **kwargs):
        return [broken(model, task, what, c, **kwargs) for c in configs]

    for executor in ("serial", "batched"):
        store = Store(tmp_path / executor)
        monkeypatch.setattr(executors, "finetune", broken)
        monkeypatch.setattr(executors, "finetune_many", broken_together)
        with pytest.warns(UserWarning, match=r"2 of 8 runs failed, first formula-vit-tiny digits MHA .*seed=1: RuntimeError: the image of a cat"):
            frame = sweep(GRID, store, executor, progress=False)
        assert len(frame) == 6 and len(store.failures()) == 2 and all("the image of a cat" in text and "Traceback" in text for text in store.failures().values())
        monkeypatch.undo()
        assert len(sweep(GRID, store, executor, progress=False)) == 8 and store.failures() == {}
    assert contents(tmp_path / "serial") == undisturbed[1]


def test_a_group_trained_together_gives_the_same_records(tmp_path, undisturbed):
    frame = sweep(GRID, tmp_path, "batched", progress=False)
    assert frame.together.eq(4).all() and frame.attrs["executor"] == "one process, CPU, groups as one computation"
    found = contents(tmp_path)
    assert found.keys() == undisturbed[1].keys() and all(close(found[k], undisturbed[1][k]) for k in found)


def test_a_group_that_does_not_fit_is_halved(tmp_path, monkeypatch):
    from vitplast.training import finetune_many

    def small(model, task, what, configs, **kwargs):
        if len(configs) > 2:
            raise torch.OutOfMemoryError("no")
        return finetune_many(model, task, what, configs, **kwargs)

    monkeypatch.setattr(executors, "finetune_many", small)
    assert sweep(GRID, tmp_path, "batched", progress=False).together.eq(2).all()
    monkeypatch.setattr(executors, "runs_that_fit", lambda *args: 3)
    monkeypatch.setattr(executors, "finetune_many", finetune_many)
    assert sorted(sweep(GRID, tmp_path / "b", "batched", progress=False).together) == [1, 1, 3, 3, 3, 3, 3, 3]


class Killer(threading.Thread):
    "Kills worker processes, one after the other, until `enough`."

    def __init__(self, find, enough):
        super().__init__(daemon=True)
        self.find, self.enough, self.killed = find, enough, []

    def run(self):
        while not self.enough():
            time.sleep(0.02)
            if fresh := [pid for pid in self.find() if pid not in self.killed]:
                self.killed.append(fresh[0])
                try:
                    os.kill(fresh[0], signal.SIGKILL)
                except ProcessLookupError:
                    continue
                time.sleep(1)  # a death takes a moment to be noticed


def children():
    return [p.pid for p in multiprocessing.active_children()]


@pytest.fixture
def deaths(monkeypatch):
    "Every death of a worker that a sweep has noticed."
    noticed, settle = [], Sweep.settle

    def noting(self, future, broken):
        if died := settle(self, future, broken):
            noticed.append(future)
        return died

    monkeypatch.setattr(Sweep, "settle", noting)
    return noticed


def test_a_worker_that_dies_is_replaced(tmp_path, undisturbed, deaths):
    killer = Killer(lambda: children() if list(tmp_path.glob("*.json")) else [], lambda: deaths)
    killer.start()
    frame = sweep(GRID, tmp_path, "processes", 2, progress=False)
    killer.join()
    assert deaths and len(frame) == 8 and contents(tmp_path) == undisturbed[1]
    assert Store(tmp_path).failures() == {} and not children()


def test_a_run_whose_worker_always_dies_is_given_up(tmp_path, deaths):
    killer = Killer(children, lambda: Store(tmp_path).failures())
    killer.start()
    with pytest.warns(UserWarning, match="1 of 1 runs failed, .*its worker died 3 times"):
        frame = sweep(replace(GRID, selections=("LN1",), lrs=(0.03,), seeds=(0,)), tmp_path, "processes", 1, progress=False)
    killer.join()
    assert len(deaths) == 2 and len(killer.killed) == 3 and len(frame) == 0  # the third death is an error


def ray_workers() -> list:
    "Processes of Ray that are computing a run."
    names = {p.parent: p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()}
    return [int(p.name) for p, name in names.items() if name.startswith(b"ray::on_one_thread")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_a_ray_cluster_of_two_workers_one_of_them_killed(tmp_path, undisturbed, deaths):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killer = Killer(lambda: ray_workers() if list(tmp_path.glob("*.json")) else [], lambda: deaths)
        killer.start()
        frame = sweep(GRID, tmp_path, "ray", progress=False)
        killer.join()
        assert frame.attrs["executor"] == "Ray, 2 cores" and deaths
        assert len(frame) == 8 and contents(tmp_path) == undisturbed[1] and Store(tmp_path).failures() == {}
        assert ray.is_initialized()  # a cluster that was there before is left as it was
        with pytest.warns(UserWarning, match="1 of 1 runs failed"):
            bad = replace(GRID, tasks=(str(tmp_path),), selections=("LN1",), lrs=(0.03,), seeds=(0,))  # a folder without images
            assert len(sweep(bad, tmp_path / "bad", "ray", progress=False)) == 0
    finally:
        ray.shutdown()


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_ctrl_c_stops_long_before_the_end(tmp_path, executor):
    plan, store = tmp_path / "plan.json", tmp_path / "store"
    plan.write_text(json.dumps(asdict(replace(GRID, config=replace(CONFIG, steps=40), seeds=tuple(range(9))))))
    command = [sys.executable, "-m", "vitplast.cli", "sweep", str(plan), "--store", str(store), "--executor", executor]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(store.glob("*.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    assert "Traceback" not in said and f"Finished runs are kept in {store}" in said
    assert 0 < len(Store(store)) < 18 and not list(store.glob(".*"))


def test_frames(tmp_path, undisturbed):
    frame, records = undisturbed
    assert [(r.component, r.lr, r.seed) for r in frame.itertuples()] == [(r.components, r.config.lr, r.config.seed) for r in GRID.runs()]
    store = Store(tmp_path)
    sweep(GRID, store, "serial", progress=False)
    runs = stored_runs(store)
    assert len(runs) == 8 and run_frame(runs).sort_values(["seed", "component", "lr"]).test_accuracy.tolist() == frame.sort_values(["seed", "component", "lr"]).test_accuracy.tolist()
    curves = curve_frame(runs)
    assert len(curves) == 8 * len(runs[0]["history"]["step"]) and curves.groupby(["component", "lr", "seed"]).ngroups == 8
    one = vp.finetune(vp.load("formula-vit-tiny"), vp.task("digits"), "MHA", replace(CONFIG, lr=0.3, seed=1))
    mine = frame[(frame.component == "MHA") & (frame.lr == 0.3) & (frame.seed == 1)].iloc[0]
    assert mine.test_accuracy == one.test_accuracy and mine.n_trained == one.n_trained and mine.grad_norm == pytest.approx(one.history.grad_norm.mean())


def test_the_probe_is_computed_once_and_is_the_probe(tmp_path, monkeypatch):
    frame = probe_frame(GRID, tmp_path, progress=False)
    assert frame.accuracy.tolist() == [vp.linear_probe(vp.load("formula-vit-tiny"), vp.task("digits"))]
    monkeypatch.setattr(sys.modules["vitplast.runs.sweep"], "linear_probe", None)  # the door gives the function
    assert probe_frame(GRID, tmp_path, progress=False).equals(frame)


def test_estimates(tmp_path, undisturbed):
    runs, store = GRID.runs(), Store(tmp_path)
    tiny, small = vp.load("formula-vit-tiny"), vp.load("formula-vit")
    tokens = [(m.patch_embed.num_patches + m.num_prefix_tokens) * sum(p.numel() for p in m.parameters()) for m in (tiny, small)]
    assert [arithmetic("formula-vit-tiny"), arithmetic("formula-vit")] == tokens
    assert arithmetic("vit_base_patch16_224.orig_in21k") == 197 * 85_798_656
    c = runs[0].config
    readings = sum(step % c.eval_every == 0 or step == c.steps for step in range(1, c.steps + 1))
    assert size_of(runs[0]) == tokens[0] * (3 * 8 + (readings * READ["offline"][0] + READ["offline"][1]) / 3)
    real = vp.task("digits")  # the counts are near the real ones
    assert 0.5 < READ["offline"][0] / len(real.validation) < 2 and 0.5 < READ["offline"][1] / len(real.test) < 2
    guess = seconds_left(runs, store, 1)
    assert guess > 0
    sweep(replace(GRID, seeds=(0,)), store, "serial", progress=False)
    found = stored_runs(store)
    assert seconds_left(runs, store, 1) == pytest.approx(sum(r["seconds"] for r in found))  # the other half costs the same
    assert seconds_left(runs, store, 4) == pytest.approx(sum(r["seconds"] for r in found) / 4)
    sweep(GRID, store, "serial", progress=False)
    assert seconds_left(runs, store, 1) == 0
    assert [in_words(s) for s in (3, 119, 121, 7199, 7201, 200000, 1e9)] == ["3 s", "119 s", "2 min", "120 min", "2 h", "2 days", "32 years"]


def test_executors():
    assert choose("local").words == (f"{executors.cores()} process{'es' * (executors.cores() > 1)}" if not torch.cuda.is_available() else choose("batched").words)
    assert choose("processes", 3).slots == 3 and choose("serial")[1:3] == (1, False)
    for executor, workers, message in (("cluster", None, "unknown executor 'cluster'"), ("bached", None, "nearest known: .'batched'"), ("serial", 0, "workers=0: expected a positive integer")):
        with pytest.raises(ValueError, match=message):
            choose(executor, workers)


def pretended(monkeypatch, best, broken=()):
    "Runs that compute nothing: their accuracy falls with the distance of their rate from the best one of their arm."
    computed = []

    def compute(runs, compiled=False):
        outcomes = []
        for run in runs:
            c = run.config
            computed.append((run.components, c.clip_head, c.lr))
            accuracy = 1 - abs(math.log10(c.lr / best[run.components, c.clip_head])) / 50
            history = {"step": [1], "lr": [c.lr], "loss": [1.0], "grad_norm": [1.0], "validation_loss": [1.0], "validation_accuracy": [accuracy]}
            out = {"validation_accuracy": accuracy, "test_accuracy": accuracy, "best_step": 1, "diverged": False, "n_trained": 1, "seconds": 1.0, "together": len(runs), "history": history}
            outcomes.append(("error", "it broke") if computed[-1] in broken else ("record", run.identity() | {"model": run.model, "task": run.task} | out))
        return outcomes

    monkeypatch.setattr(sys.modules["vitplast.runs.sweep"], "compute", compute)
    return computed


@pytest.mark.parametrize("executor", ["serial", "batched"])
def test_a_sweep_goes_on_where_the_best_rate_lies_on_the_edge(tmp_path, monkeypatch, executor):
    best = {("LN1", "separate"): 3.0, ("MHA", "separate"): 0.003, ("LN1", "joint"): 0.03, ("MHA", "joint"): 1e9}
    computed = pretended(monkeypatch, best)
    grids = [replace(GRID, lrs=(0.003, 0.03, 0.3), config=replace(CONFIG, clip_head=how)) for how in ("separate", "joint")]
    assert not sweep(grids[0], tmp_path / "plain", executor, progress=False).query("lr > 0.3").size and len(computed) == 12
    frame = sweep(grids, tmp_path / "store", executor, progress=False, extend=True)
    arms = {arm: (sorted(mine.lr.unique()), mine.edge.unique().tolist()) for arm, mine in frame.groupby(["component", "clip_head"])}
    assert arms == {
        ("LN1", "separate"): ([0.003, 0.03, 0.3, 3.0, 30.0], [False]), ("MHA", "separate"): ([0.0003, 0.003, 0.03, 0.3], [False]),
        ("LN1", "joint"): ([0.003, 0.03, 0.3], [False]), ("MHA", "joint"): ([0.003, 0.03, 0.3, 3.0, 30.0, 300.0, 3000.0], [True]),
    }  # fmt: skip
    assert (frame.groupby(["component", "clip_head", "lr"]).seed.nunique() == 2).all()
    before = len(computed)
    again = sweep(grids, tmp_path / "store", executor, progress=False, extend=True)
    assert len(computed) == before and again.equals(frame)
    with pytest.raises(ValueError, match=r"runs of 2 recipes \(clip_head \['separate', 'joint'\]\): expected those of one"):
        best_rates(frame)
    assert best_rates(frame[frame.clip_head == "separate"]).droplevel([0, 1, 2]).to_dict() == {"LN1": 3.0, "MHA": 0.003}
    with pytest.raises(ValueError, match="a single rate|ratio"):
        sweep(replace(GRID, lrs=(0.1,)), tmp_path / "one", executor, progress=False, extend=True)


def test_a_further_rate_that_fails_is_tried_again(tmp_path, monkeypatch):
    best = {("LN1", "separate"): 3.0, ("MHA", "separate"): 0.03}
    grid = replace(GRID, lrs=(0.003, 0.03, 0.3))
    pretended(monkeypatch, best, broken={("LN1", "separate", 3.0)})
    with pytest.warns(UserWarning, match="2 of 14 runs failed, first formula-vit-tiny digits LN1 sgd lr=3 seed=0: it broke"):
        frame = sweep(grid, tmp_path, "serial", progress=False, extend=True)
    assert frame.attrs["failed"] == 2 and frame.groupby("component").edge.first().to_dict() == {"LN1": True, "MHA": False}
    computed = pretended(monkeypatch, best)
    frame = sweep(grid, tmp_path, "serial", progress=False, extend=True)
    assert {lr for _, _, lr in computed} == {3.0, 30.0} and not frame.edge.any() and Store(tmp_path).failures() == {}


def test_runs_of_another_version_do_not_count_and_are_said(tmp_path, monkeypatch):
    pretended(monkeypatch, {("LN1", "separate"): 0.03, ("MHA", "separate"): 0.03})
    sweep(GRID, tmp_path, "serial", progress=False)
    for module in ("grid", "sweep"):
        monkeypatch.setattr(sys.modules[f"vitplast.runs.{module}"], "TRAINING_VERSION", 10**6)
    with pytest.warns(UserWarning, match="holds 8 runs of another version of the training; they do not count"):
        sweep(GRID, tmp_path, "serial", progress=False)
    assert len(Store(tmp_path)) == 16


def test_pictures_and_weights_that_change_are_read_again(tmp_path):
    "One process, two states of a folder: the second is another task, and not the one that was kept."
    from PIL import Image

    run = replace(GRID, tasks=("digits",)).runs()[0]
    for state in (10, 200):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            for i in range(5):
                Image.new("L", (8, 8), state + i + 10 * (name == "b")).save(tmp_path / name / f"{i}.png")
        folder_contents.cache_clear()
        task = materials(replace(run, task=str(tmp_path)).base())[1]
        assert abs(int(task.train.images.float().mean()) - state) < 20


def test_what_a_frozen_network_knows_is_a_probe_or_its_own_head():
    from vitplast.data import byte_task
    from vitplast.models import GPTConfig, build
    from vitplast.runs.sweep import before_training

    model = build(GPTConfig(context=8, width=16, depth=1, heads=2))
    made = byte_task("abc", {n: b"abcabc" * 20 for n in ("train", "validation", "test")}, 8)
    right = model(made.test.images).logits.argmax(-1) == made.test.labels
    assert before_training(model, made) == right.double().mean().item()
    digits, vit = vp.task("digits"), vp.load("formula-vit-tiny")
    assert before_training(vit, digits) == vp.linear_probe(vit, digits)
