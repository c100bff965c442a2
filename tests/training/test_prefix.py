"""Tokens that are kept: against the whole network at every step, for every architecture, and where nothing may be kept."""
import sys

import numpy as np
import pytest
import torch
from architectures import HEADED, SEQUENCES, build
from conftest import tiny_vit

import vitplast as vp
from vitplast.data import RandomCrops, Split, Task
from vitplast.models import anatomy, prepare
from vitplast.training import prefix
from vitplast.training.prefix import KEPT, before, first_trained, fixed, going_on, reused

CONFIG = vp.FinetuneConfig(steps=6, eval_every=2, batch_size=8, lr=0.05)


def whole(monkeypatch, *args):
    "The same run with the whole network at every step."
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["vitplast.training.finetune"], "reused", lambda *_: None)
        return vp.finetune(*args)


@pytest.mark.parametrize("what, block", [("FC1@1", 1), ("LN2@-1 + MHA@2", 2), ("head", 3), ("MHA.v@1", 1)])
def test_a_run_is_the_run_of_the_whole_network(stripes, monkeypatch, what, block):
    model = tiny_vit(depth=3, num_classes=3)
    run, slow = vp.finetune(model, stripes, what, CONFIG), whole(monkeypatch, model, stripes, what, CONFIG)
    assert KEPT[stripes].block == block
    np.testing.assert_allclose(run.history.loss, slow.history.loss, rtol=1e-9)
    assert run.test_accuracy == slow.test_accuracy and run.n_trained == slow.n_trained
    for a, b in zip(run.model.parameters(), slow.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not any("forward" in vars(m) for m in run.model.modules())


@pytest.mark.parametrize("name", [n for n in HEADED if n not in SEQUENCES])
def test_every_architecture_trains_as_it_does_whole(stripes, monkeypatch, name):
    model = build(name)
    model.pretrained_cfg = getattr(model, "pretrained_cfg", None) or {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    for what in ("FC1@-1", "head"):
        run, slow = vp.finetune(model, stripes, what, CONFIG), whole(monkeypatch, model, stripes, what, CONFIG)
        assert KEPT[stripes].done["train"].sum() == 48 and KEPT[stripes].done["validation"].all()
        np.testing.assert_allclose(run.history.loss, slow.history.loss, rtol=1e-7)
        assert run.test_accuracy == slow.test_accuracy


@pytest.mark.parametrize("name", [n for n in HEADED if n not in SEQUENCES])
def test_every_architecture_goes_on_from_a_block(name):
    model = build(name)
    parts, x = anatomy(model), torch.randn(3, *anatomy(model).image_shape, dtype=torch.float64)
    with torch.no_grad():
        expected = parts.logits(x)
        for block in (1, 2):
            tokens = before(parts, block, x)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            torch.testing.assert_close(going_on(model, block)(tokens), expected)
        torch.testing.assert_close(parts.logits(x), expected)  # nothing is left behind


def test_where_training_begins():
    model = tiny_vit(depth=3, num_classes=3)
    names = [n for n, _ in model.named_parameters()]
    assert first_trained(model, names) == 0 == first_trained(model, ["pos_embed"])
    assert first_trained(model, ["head.weight", "norm.bias"]) == 3
    assert first_trained(model, ["head.weight", "blocks.2.norm1.bias", "blocks.1.attn.qkv.weight"]) == 1


def test_nothing_is_kept_where_steps_differ(stripes, model):
    names = ["blocks.1.norm1.weight"]
    assert reused(model, stripes, names, CONFIG) is not None
    assert reused(model, stripes, ["blocks.0.norm1.weight"], CONFIG) is None
    assert reused(model, stripes, names, vp.FinetuneConfig(watch=("FC1",))) is None
    crops = RandomCrops(16, torch.tensor([[16, 16]] * len(stripes.train)))
    moving = Task("moving", stripes.classes, *(getattr(stripes, s) for s in ("train", "validation", "test")), 1, crops)
    assert reused(model, moving, names, CONFIG) is None


def test_what_is_drawn_at_random_is_noticed(stripes):
    x = prepare(tiny_vit(), stripes.train.images[:2])
    for dropping in ({"pos_drop_rate": 0.2}, {"patch_drop_rate": 0.5}, {"proj_drop_rate": 0.2}, {"attn_drop_rate": 0.5}, {"drop_path_rate": 0.5}):
        model = tiny_vit(depth=3, **dropping)
        state = torch.random.get_rng_state()
        assert not fixed(model, 3, x), dropping
        assert torch.equal(torch.random.get_rng_state(), state)
    assert fixed(tiny_vit(depth=3), 3, x)


def test_tokens_are_used_again_by_the_network_that_made_them(stripes, monkeypatch):
    model, computed = tiny_vit(depth=3, num_classes=3), []
    monkeypatch.setattr(prefix, "before", lambda *a: computed.append(len(a[2])) or before(*a))
    vp.finetune(model, stripes, "FC1@2", CONFIG)
    once = len(computed), sum(computed)
    vp.finetune(model, stripes, "FC2@2", CONFIG)
    # whether it may (twice two), the few that tell (eight), one blank; no empty batch
    assert computed[once[0]:] == [2, 2, 8, 1] and once[1] == 4 + 8 + 1 + 48 + 21 and 0 not in computed


def scaled_weights(model):
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.001)


def other_activation(model):
    model.blocks[0].mlp.act = torch.nn.ReLU()


def other_heads(model):
    model.blocks[1].attn.num_heads, model.blocks[1].attn.head_dim = 2, 6


def other_normalisation(model):
    model.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.25,) * 3}


def a_hook(model):
    model.blocks[0].register_forward_hook(lambda _, args, out: out + 0.5)


def other_pictures(_):
    return 1


@pytest.mark.parametrize("change", [scaled_weights, other_activation, other_heads, other_normalisation, a_hook, other_pictures])
def test_another_network_computes_its_own_tokens(stripes, monkeypatch, change):
    model = tiny_vit(depth=3, num_classes=3)
    first = vp.finetune(model, stripes, "FC1@2", CONFIG)
    if change(model):
        stripes.train.images.copy_(255 - stripes.train.images)
    again, slow = vp.finetune(model, stripes, "FC1@2", CONFIG), whole(monkeypatch, model, stripes, "FC1@2", CONFIG)
    np.testing.assert_allclose(again.history.loss, slow.history.loss, rtol=1e-9)
    assert (again.history.loss != first.history.loss).any()


def test_another_precision_computes_its_own_tokens(stripes):
    model = tiny_vit(depth=3, num_classes=3).float()
    vp.finetune(model, stripes, "FC1@2", CONFIG)
    assert KEPT[stripes].sample.dtype == torch.float32
    vp.finetune(model.double(), stripes, "FC1@2", CONFIG)
    assert KEPT[stripes].sample.dtype == torch.float64


def test_a_disk_without_room_keeps_nothing(stripes, monkeypatch):
    model = tiny_vit(depth=3, num_classes=3)
    expected = vp.finetune(model, stripes, "FC1@2", CONFIG).history.loss
    KEPT.clear()
    monkeypatch.setattr(prefix, "LARGEST", 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    np.testing.assert_allclose(vp.finetune(model, stripes, "FC1@2", CONFIG).history.loss, expected, rtol=1e-9)
    assert stripes not in KEPT


def test_large_ones_lie_on_disk(stripes, monkeypatch):
    model = tiny_vit(depth=3, num_classes=3)
    expected = vp.finetune(model, stripes, "FC1@2", CONFIG).history.loss
    KEPT.clear()
    monkeypatch.setattr(prefix, "LARGEST", 0)
    assert (vp.finetune(model, stripes, "FC1@2", CONFIG).history.loss == expected).all()
    tokens, folder = KEPT[stripes].rooms["train"]
    assert folder is not None and tokens.shape[0] == len(stripes.train)


def test_tokens_go_with_their_task(model, stripes):
    split = Split(stripes.train.images[:8], stripes.train.labels[:8])
    task = Task("short", stripes.classes, split, split, split, 8)
    vp.finetune(model, task, "head", vp.FinetuneConfig(steps=1, batch_size=4))
    assert list(KEPT) == [task]
    del task
    assert not len(KEPT)
