"""Pretraining: stopped and taken up without a trace, snapshots, the log, the sizes, and the shipped models' cards."""
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

import vitplast as vp
from vitplast.data import FormulaConfig, FormulaImages
from vitplast.models import ViTConfig, build, card, shipped
from vitplast.models.loading import load_local
from vitplast.training import PretrainConfig, SIZES, publish
from vitplast.training.pretrain import (
    Heads, Pretraining, losses, pretrain, snapshot_path,
)

module = sys.modules["vitplast.training.pretrain"]  # the door gives the function

FEW = PretrainConfig(vit=ViTConfig(width=32, depth=2, heads=2), formula=FormulaConfig(n_shapes=4, n_textures=4), images=96, batch=8)


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setattr(module, "probe", lambda model, config, split="validation": 0.5)


def weights(run):
    return {k: p.detach().clone() for k, p in run.parameters.items()}


def test_snapshots_are_the_weights_of_their_step(tmp_path):
    path = tmp_path / "m.safetensors"
    pretrain(FEW, path, snapshots=(0.5,), probes=2, progress=False)
    half = Pretraining(FEW)
    for _ in range(6):
        half.update()
    snapshot = load_local(snapshot_path(path, 48))
    assert all(torch.equal(p, half.parameters[f"model.{k}"]) for k, p in snapshot.named_parameters())
    about = json.loads(snapshot_path(path, 48).with_suffix(".json").read_text())
    assert about["steps"] == 6 and about["images"] == 48
    assert snapshot_path("a/formula-vit.safetensors", 899_968).name == "formula-vit-900k.safetensors"


def test_stopping_during_a_snapshot_makes_it_again(tmp_path, monkeypatch):
    path, calls = tmp_path / "m.safetensors", []

    def stop(run, where):
        calls.append(where)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(FEW, path, snapshots=(0.5,), progress=False)
    monkeypatch.setattr(module, "publish", publish)
    resumed = pretrain(FEW, path, snapshots=(0.5,), progress=False)
    undisturbed = pretrain(FEW, tmp_path / "n.safetensors", progress=False)
    assert snapshot_path(path, 48).exists() and len(calls) == 1
    assert all(torch.equal(p, weights(undisturbed)[k]) for k, p in weights(resumed).items())


@pytest.mark.parametrize("snapshots, message", [
    ((50,), "snapshot at 50: expected a share of the training between 0 and 1"), ((-1,), "snapshot at -1"), ((1.0,), "snapshot at 1.0"),
    ((0.25, 0.5), r"snapshots \[0.25, 0.5\]: two of them are fewer than 1,000 images apart"),
])  # fmt: skip
def test_snapshots_that_cannot_be_kept(tmp_path, snapshots, message):
    with pytest.raises(ValueError, match=message):
        pretrain(FEW, tmp_path / "m.safetensors", snapshots=snapshots, progress=False)


def test_the_snapshot_of_another_run_is_replaced(tmp_path):
    path, other = tmp_path / "m.safetensors", replace(FEW, seed=5)
    pretrain(FEW, path, snapshots=(0.5,), progress=False)
    path.with_suffix(".state").unlink()
    pretrain(other, path, snapshots=(0.5,), progress=False)
    assert json.loads(snapshot_path(path, 48).with_suffix(".json").read_text())["pretraining"]["seed"] == 5


def test_a_stop_during_a_probe_loses_no_row(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "LOG_EVERY", 3)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(module, "probe", stop)
        pretrain(FEW, tmp_path / "m.safetensors", probes=2, progress=False)
    resumed = pretrain(FEW, tmp_path / "m.safetensors", probes=2, progress=False)
    whole = pretrain(FEW, tmp_path / "n.safetensors", probes=2, progress=False)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in resumed.log] == [{k: v for k, v in row.items() if k != "seconds"} for row in whole.log]


def test_a_loss_that_is_not_finite_stops_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="no longer finite after 12 steps: choose a smaller lr than 1e.30"):
        pretrain(replace(FEW, lr=1e30), tmp_path / "m.safetensors", progress=False)
    assert not (tmp_path / "m.state").exists()


@pytest.mark.parametrize("kwargs", [dict(lr=float("nan")), dict(lr=-1.0), dict(warmup=2), dict(curriculum=-1), dict(clip=0), dict(images=3)])
def test_bad_configurations(kwargs):
    (name, value), = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        replace(FEW, **kwargs)


def test_a_state_of_another_device_is_refused(tmp_path, monkeypatch):
    run = Pretraining(FEW)
    run.update()
    monkeypatch.setattr(run, "device", torch.device("meta"))
    run.save(tmp_path / "m.state")
    with pytest.raises(ValueError, match="the state of a pretraining on meta, expected cpu"):
        pretrain(FEW, tmp_path / "m.safetensors", progress=False)


def test_the_log_has_every_row_and_its_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOG_EVERY", 3)
    pretrain(FEW, tmp_path / "m.safetensors", probes=2, progress=False)
    log = pd.read_csv(tmp_path / "m.csv")
    assert log.images.tolist() == [24, 48, 72, 96] and log.probe.notna().sum() == 2 and log.probe.iloc[-1] == 0.5
    assert {"shape", "texture", "mask", "shape_accuracy", "texture_accuracy"} <= set(log) and log.seconds.is_monotonic_increasing


def test_kill_9_loses_at_most_what_came_after_the_last_state(tmp_path):
    path = tmp_path / "m.safetensors"
    endless = replace(FEW, images=800_000)
    code = (
        "import torch; torch.set_num_threads(1)  # as here: the order of a sum depends on it\n"
        "import sys; from vitplast.training.pretrain import *; from vitplast.data import FormulaConfig; from vitplast.models import ViTConfig\n"
        f"sys.modules['vitplast.training.pretrain'].SAVE_EVERY = 0.0; pretrain({endless!r}, {str(path)!r}, progress=False)"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    while not path.with_suffix(".state").exists():
        time.sleep(0.1)
        assert child.poll() is None
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    run = Pretraining(endless)
    run.restore(path.with_suffix(".state"))
    assert run.step > 0
    same = Pretraining(run.config)
    for _ in range(run.step):
        same.update()
    assert all(torch.equal(p, weights(same)[k]) for k, p in weights(run).items())


def test_a_state_of_another_pretraining_is_refused(tmp_path):
    pretrain(FEW, tmp_path / "m.safetensors", progress=False)
    with pytest.raises(ValueError, match="m.state: the state of another pretraining"):
        pretrain(replace(FEW, lr=1e-3), tmp_path / "m.safetensors", progress=False)


def test_texture_accuracy_counts_visible_patches_only():
    formula = FormulaImages(FEW.formula)
    batch = formula.sample(16, torch.Generator().manual_seed(0))
    model, heads = build(FEW.vit), Heads(FEW)
    with torch.no_grad():
        heads.texture.weight.zero_()
        heads.texture.bias.copy_(torch.tensor([0.0, 9, 0, 0]))  # always the second texture
        found = losses(model, heads, batch, FEW)["texture_accuracy"]
    share = torch.nn.functional.avg_pool2d(batch.mask[:, None], 8).flatten(1)
    label = torch.where(share > 0.6, batch.front[:, None], torch.where(share < 0.25, batch.back[:, None], -1))
    assert found.item() == pytest.approx((label == 1).sum().item() / (label >= 0).sum().item())


def test_bf16_is_close_to_float32():
    batch = FormulaImages(FEW.formula).sample(32, torch.Generator().manual_seed(0))
    model, heads = build(FEW.vit), Heads(FEW)
    exact, rough = (losses(model, heads, batch, replace(FEW, bf16=b)) for b in (False, True))
    for name in ("shape", "texture", "mask"):
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.02)


@pytest.mark.long
def test_the_compiled_losses_are_the_losses():
    batch = FormulaImages(FEW.formula).sample(32, torch.Generator().manual_seed(0))
    run, plain = Pretraining(FEW, compiled=True), Pretraining(FEW)
    compiled = run.losses(run.model, run.heads, batch, FEW)
    for name, value in plain.losses(plain.model, plain.heads, batch, FEW).items():
        assert compiled[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_sizes_are_in_the_proportion_of_the_published_models():
    n = {name: sum(p.numel() for p in build(vit).parameters()) for name, vit in SIZES.items()}
    assert n["small"] / n["tiny"] == pytest.approx(307 / 86, rel=0.15)
    assert n["base"] / n["tiny"] == pytest.approx(632 / 86, rel=0.15)
    assert SIZES["large"] == ViTConfig(size=64, patch=8, width=192, depth=12, heads=3)


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith("formula")])
def test_every_shipped_model_is_what_its_card_says(name):
    about, model = card(name), vp.load(name)
    config = PretrainConfig.from_dict(about["pretraining"])
    assert about["images"] == about["steps"] * config.batch <= config.images
    assert vp.linear_probe(model, vp.task("digits")) == pytest.approx(about["linear_probe"]["pretrained"], abs=0.01)
    assert vp.linear_probe(build(config.vit, config.seed), vp.task("digits")) == pytest.approx(about["linear_probe"]["untrained"], abs=0.01)
    untrained = build(config.vit, config.seed).state_dict()
    assert not torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], untrained["blocks.0.attn.qkv.weight"])
