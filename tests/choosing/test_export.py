"""What is pasted into other programs matches what the selection trains, and nothing else: torch, timm, peft, and the pasted lines themselves."""
import copy
import re

import pytest
import timm
import torch
import yaml
from architectures import HEADED, SEQUENCES, build
from conftest import tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.choosing import as_regex, param_groups, peft_config, trained_names, trainer_code, unfrozen_yaml
from vitplast.models import KINDS, anatomy

PICTURES = [n for n in HEADED if n not in SEQUENCES]


def every(model):
    return [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("selection", ["MHA", "LN1@0+FC2@-1", "all@1", "LN1+LN2"])
def test_names_are_those_that_train(name, selection):
    model = build(name)
    with vp.trainable(model, selection, head=False) as training:
        names = training.names
    assert trained_names(model, selection) == names
    pattern = re.compile(as_regex(model, names))
    assert [n for n in every(model) if pattern.fullmatch(n)] == [n for n in every(model) if n in set(names)]
    lines = yaml.safe_load(unfrozen_yaml(model, {selection: 0.1}))["unfrozen_parameters"]
    assert {n for n in every(model) if any(re.search(line, n) for line in lines)} == set(names) | anatomy(model).head().keys()


@settings(deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(every(tiny_vit(depth=12, num_classes=2))), min_size=1))
def test_any_set_of_names_has_a_pattern_that_matches_it_alone(names):
    model = tiny_vit(depth=12, num_classes=2)
    pattern = re.compile(as_regex(model, names))
    assert {n for n in every(model) if pattern.fullmatch(n)} == names


@pytest.mark.parametrize("name", PICTURES)
def test_groups_hold_each_parameter_once_and_freeze_the_rest(name):
    model = build(name)
    rates = {"MHA": 0.01, "LN2@0": 0.3}
    groups = param_groups(model, rates, head_lr=0.2)
    inside = [p for g in groups for p in g["params"]]
    assert len({id(p) for p in inside}) == len(inside)
    assert {id(p) for p in inside} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {g["name"]: g["lr"] for g in groups} == rates | {"head": 0.2}
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in anatomy(model).head().values()}


def test_a_step_of_the_groups_is_a_step_of_plain_descent():
    model = tiny_vit(num_classes=3)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(param_groups(model, {"MHA@1": 0.5, "LN1": 0.25}))
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for m in (model, before):
        m(x).square().sum().backward()
    optimizer.step()
    rate = {n: 0.5 if n.startswith("blocks.1.attn") else 0.25 if "norm1" in n else 0.5 if n.startswith("head") else 0.0 for n in every(model)}
    for (n, p), old in zip(model.named_parameters(), before.parameters()):
        torch.testing.assert_close(p, old - rate[n] * old.grad if rate[n] else old)


def test_timms_optimizer_and_scheduler_give_the_groups_their_rates():
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2)
    rates = {"MHA": 0.02, "LN1": 0.2}
    optimizer = create_optimizer_v2(param_groups(model, rates, base_lr=0.1), opt="sgd", lr=0.1)
    scheduler, _ = create_scheduler_v2(optimizer, "step", num_epochs=10, decay_epochs=1, decay_rate=0.5, warmup_epochs=0)
    for epoch, factor in ((0, 1), (1, 0.5), (2, 0.25)):
        scheduler.step(epoch)
        found = {g["name"]: g["lr"] for g in optimizer.param_groups}
        assert found == pytest.approx({s: lr * factor for s, lr in rates.items()} | {"head": 0.2 * factor})


@pytest.mark.parametrize("name", PICTURES)
def test_lora_adapts_the_matrices_of_the_selection_and_trains_its_norms(name):
    from peft import get_peft_model

    model = build(name)
    config = peft_config(model, "FC1@-1+LN1@0", r=2)
    built = get_peft_model(copy.deepcopy(model), config)
    trained = {n: p.shape for n, p in built.named_parameters() if p.requires_grad}
    own = dict(model.named_parameters())
    names = trained_names(model, "FC1@-1")
    layers = {n.rpartition(".")[0] for n in names}
    adapters = {n: s for n, s in trained.items() if "lora_" in n}
    assert len(adapters) == 2 * len(layers)
    for layer in layers:
        out, into = own[f"{layer}.weight"].shape
        found = {n.split(".lora_")[1][0]: s for n, s in adapters.items() if f".{layer}." in n}
        assert found == {"A": (2, into), "B": (out, 2)}
    whole = sum(own[n].numel() for n in trained_names(model, "LN1@0"))
    head = sum(p.numel() for p in anatomy(model).head().values())
    assert sum(s.numel() for n, s in trained.items() if "lora_" not in n) == whole + head


def test_ranks_by_selection():
    model = tiny_vit(num_classes=3)
    config = peft_config(model, "MHA+FC1@0", r={"MHA": 4, "FC1@0": 1}, lora_dropout=0.1)
    assert config.r == 4 and config.rank_pattern == {"blocks.0.mlp.fc1": 1} and config.alpha_pattern == {"blocks.0.mlp.fc1": 2}
    assert config.lora_alpha == 8 and config.lora_dropout == 0.1


@pytest.mark.parametrize("r, message", [(0, "r=0"), (2.0, "r=2.0"), ({"MHA@0": 2}, "no rank for blocks.1"), ({"MHA": 2, "FC1": 1}, "r names blocks.0.mlp.fc1")])
def test_ranks_that_are_none(r, message):
    with pytest.raises(ValueError, match=message):
        peft_config(tiny_vit(num_classes=3), "MHA", r=r)


def test_what_other_programs_cannot_do_is_refused():
    model = tiny_vit(num_classes=3)
    with pytest.raises(ValueError, match="has no linear layers"):
        peft_config(model, "LN1")
    with pytest.raises(ValueError, match="trains a part of blocks.0.attn.qkv.weight"):
        trained_names(model, "MHA.v")
    with pytest.raises(ValueError, match="both train blocks.1.attn"):
        param_groups(model, {"MHA": 0.1, "MHA@1": 0.2})
    with pytest.raises(ValueError, match="nearest: MHA"):
        param_groups(model, {"MHZ": 0.1})
    with pytest.raises(ValueError, match="rate -1"):
        param_groups(model, {"MHA": -1})
    with pytest.raises(TypeError, match="learning rates by selection"):
        param_groups(model, "MHA")
    with pytest.raises(ValueError, match="no parameter of this model alone"):
        as_regex(model, ["blocks.0.attn.qkv.weight", "blocks.7.attn.qkv.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_pasted_lines_make_the_same_groups(kind):
    model = tiny_vit(num_classes=3)
    rates = {f"{kind}@0": 0.1, f"{kind}@1": 0.02}
    space = {"model": copy.deepcopy(model)}
    exec(trainer_code(model, rates, head_lr=0.3), space)
    pasted = [(g["lr"], [tuple(p.shape) for p in g["params"]]) for g in space["optimizer"].param_groups]
    assert pasted == [(g["lr"], [tuple(p.shape) for p in g["params"]]) for g in param_groups(model, rates, head_lr=0.3)]
    assert [p.requires_grad for p in space["model"].parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_rate_of_a_head_is_the_one_that_was_given():
    model = tiny_vit(num_classes=3)
    rates = {g["name"]: g["lr"] for g in param_groups(model, {"head": 0.01, "MHA": 0.1})}
    assert rates == {"head": 0.01, "MHA": 0.1}
    assert ", 0.01)" in trainer_code(model, {"head": 0.01, "MHA": 0.1})
    for bad in (0, -3):
        with pytest.raises(ValueError, match="head_lr: rate"):
            param_groups(model, {"MHA": 0.1}, head_lr=bad)
    with pytest.raises(ValueError, match="expected one"):
        param_groups(model, {"head": 0.01, "MHA": 0.1}, head_lr=0.2)
    with pytest.raises(ValueError, match="base_lr: rate 0"):
        param_groups(model, {"MHA": 0.1}, base_lr=0)


def test_pasted_lines_use_the_optimizer_that_the_rates_are_for():
    model = tiny_vit(num_classes=3)
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        space = {"model": copy.deepcopy(model)}
        exec(trainer_code(model, {"MHA": 0.1}, optimizer=name), space)
        assert type(space["optimizer"]) is kind
    with pytest.raises(ValueError, match="unknown optimizer 'adam'"):
        trainer_code(model, {"MHA": 0.1}, optimizer="adam")


def test_alpha_follows_every_rank_and_two_ranks_are_refused():
    model = tiny_vit(num_classes=3)
    config = peft_config(model, "MHA+FC1@0", r={"MHA": 4, "FC1@0": 1}, lora_alpha=32)
    assert config.lora_alpha == 32 and config.alpha_pattern == {"blocks.0.mlp.fc1": 8}
    with pytest.raises(ValueError, match="two ranks for blocks.1.attn"):
        peft_config(model, "MHA", r={"MHA": 8, "MHA@1": 4})
