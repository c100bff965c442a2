"""Pretraining on text: what is drawn, taken up again, refused, and what the card of byte-gpt says."""
import json
import math
import platform
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vitplast as vp
from vitplast.data import library_text, next_bytes
from vitplast.models import GPTConfig, build, card, single_tensors
from vitplast.models.components import anatomy
from vitplast.models.loading import load_local, save
from vitplast.training import PretrainConfig, TextConfig, bits_per_byte, pretrain, pretraining, publish
from vitplast.training.pretrain import snapshot_path

FEW = TextConfig(gpt=GPTConfig(context=16, width=16, depth=1, heads=2), windows=24, batch=4, warmup=0)


def test_a_window_is_a_piece_of_the_text_and_its_loss_that_of_transformers():
    run = FEW.begin()
    seen = []
    run.losses, plain = lambda model, windows, config: seen.append(windows) or plain(model, windows, config), run.losses
    before = {k: p.detach().clone() for k, p in run.parameters.items()}
    run.update()
    assert seen[0].shape == (4, 17) and all(bytes(w.tolist()) in library_text()["train"] for w in seen[0])
    with torch.no_grad():
        for k, p in run.parameters.items():
            assert not torch.equal(p, before[k]), k
        x = seen[0][:, :16].long()  # transformers shifts the labels itself
        assert run.model(x, labels=x).loss.item() == pytest.approx(plain(run.model, x, FEW)["loss"].item(), rel=1e-6)


def test_stopped_and_taken_up(tmp_path):
    whole = pretrain(FEW, tmp_path / "whole.safetensors", snapshots=(0.5,), progress=False)
    half = FEW.begin()
    for _ in range(2):
        half.update()
    half.save(tmp_path / "half.state")
    resumed = pretrain(FEW, tmp_path / "half.safetensors", progress=False)
    snapshot = load_local(snapshot_path(tmp_path / "whole.safetensors", 12))
    assert resumed.step == whole.step == 6
    assert all(torch.equal(p, resumed.parameters[k]) for k, p in whole.parameters.items())
    assert not torch.equal(snapshot.transformer.wte.weight, whole.model.transformer.wte.weight)
    assert whole.log[-1]["windows"] == 24 and whole.log[-1]["bits_per_byte"] == pytest.approx(whole.score(), abs=1e-3)
    with pytest.raises(ValueError, match="the state of another pretraining"):
        pretrain(replace(FEW, seed=1), tmp_path / "half.safetensors", progress=False)


def test_the_card_and_the_file(tmp_path):
    run = pretrain(FEW, tmp_path / "m.safetensors", progress=False)
    about = publish(run, tmp_path / "m.safetensors")
    assert about == json.loads((tmp_path / "m.json").read_text())
    assert TextConfig.from_dict(about["pretraining"]) == FEW and about["windows"] == 24 and about["text"]["python"] == platform.python_version()
    model = vp.load(tmp_path / "m.safetensors")
    assert model.lm_head.weight is model.transformer.wte.weight and not model.training
    assert all(torch.equal(p, run.parameters[f"model.{k}"]) for k, p in model.named_parameters())
    held = next_bytes(library_text()["validation"], 16)
    assert bits_per_byte(model, held) == pytest.approx(about["bits_per_byte"]["pretrained"], abs=0.2)  # read on a sample
    assert bits_per_byte(build(FEW.gpt, 0), held) == pytest.approx(about["bits_per_byte"]["untrained"], abs=0.05)
    assert about["bits_per_byte"]["untrained"] == pytest.approx(8, abs=0.3)


def test_bits_per_byte_against_the_definition():
    model, split = build(FEW.gpt, 1).train(), next_bytes(b"a text that is long enough for three windows", 10)
    with torch.no_grad():
        p = model(split.images).logits.softmax(-1).gather(2, split.labels[..., None])
    assert bits_per_byte(model, split, batch=3) == pytest.approx(-math.log2(math.e) * p.log().mean().item(), rel=1e-5)
    assert model.training


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="width=10 and heads=4"):
        GPTConfig(width=10)
    with pytest.raises(ValueError, match="depth=0: expected a positive integer"):
        GPTConfig(depth=0)
    with pytest.raises(ValueError, match="windows=3, batch=4: expected at least one batch"):
        replace(FEW, windows=3)
    with pytest.raises(ValueError, match="lr=0"):
        replace(FEW, lr=0)
    with pytest.raises(ValueError, match="python='2.7': the library at hand is of Python"):
        replace(FEW, python="2.7").begin()
    save(build(FEW.gpt), replace(FEW.gpt, depth=2), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="tensors do not fit its architecture, first transformer.h.1"):
        load_local(tmp_path / "m.safetensors")


def test_pretrainings_by_name():
    assert pretraining("byte-gpt") == TextConfig() and pretraining("small") == PretrainConfig()
    assert pretraining("byte-gpt", 10).windows == 320 and pretraining("tiny", 10, {"batch": 3, "lr": None}).images == 30
    with pytest.raises(ValueError, match="unknown size 'byte_gpt'; nearest known: .'byte-gpt'"):
        pretraining("byte_gpt")


def test_byte_gpt_is_what_its_card_says():
    about, model = card("byte-gpt"), vp.load("byte-gpt")
    config = TextConfig.from_dict(about["pretraining"])
    assert about["windows"] == about["steps"] * config.batch <= config.windows
    assert sum(p.numel() for p in model.parameters()) == 1_239_040 == sum(t.numel() for t in single_tensors(model).values())
    python = vp.task("python").test  # of files that the pretraining held out
    assert bits_per_byte(model, python) == pytest.approx(about["bits_per_byte"]["pretrained"], abs=0.4)
    assert bits_per_byte(build(config.gpt, config.seed), python) > 7.5


def test_logits_have_the_classes_second_and_their_cross_entropy_is_transformers_own():
    model, x = build(GPTConfig(context=16, width=16, depth=2, heads=2), 3), torch.randint(256, (3, 16))
    logits = anatomy(model).logits(x)
    assert logits.shape == (3, 256, 16)
    assert F.cross_entropy(logits[..., :-1], x[:, 1:]).item() == pytest.approx(model(x, labels=x).loss.item(), rel=1e-6)


def test_tokens_are_inputs_as_they_are():
    from vitplast.models import prepare

    model, x = build(FEW.gpt), torch.randint(256, (3, 16))
    assert torch.equal(prepare(model, x), x)
    with pytest.raises(TypeError, match="images are torch.int32"):
        prepare(model, x.int())
