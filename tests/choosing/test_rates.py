"""Suggested rates: the formula by hand, what it costs, and what is refused."""
import numpy as np
import pytest
import torch
from conftest import tiny_vit

import vitplast as vp
from vitplast.choosing import step_with_head, suggest_rates
from vitplast.data import Split, Task
from vitplast.models import CHOICES, prepare, rescale
from vitplast.theory import first_step


def task(n=48, classes=3, size=16):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    images = (torch.randint(0, 120, (n, 3, size, size), generator=g) + 60 * labels[:, None, None, None]).to(torch.uint8)
    split = Split(images, labels)
    return Task("noise", ("a", "b", "c"), split, split, split, n)


@pytest.fixture(scope="module")
def model():
    return tiny_vit(num_classes=0).float()


def test_the_rule_is_that_of_the_page(model):
    config = vp.FinetuneConfig(clip=0.5, momentum=0.8, seed=3)
    found = suggest_rates(model, task(), ["LN1", "MHA@1"], config, images=40)
    step = step_with_head(model, task(), ["LN1", "MHA@1"], images=40, seed=3)
    eta = step.rates(momentum=0.8, clip=0.5)
    assert np.allclose(found.step_rate, eta) and list(found.selection) == ["LN1", "MHA@1"]
    assert np.allclose(found.lr, 0.4 * eta**0.5, rtol=0.06)
    assert all(len(f"{lr:.10g}".replace(".", "").strip("0").split("e")[0]) <= 2 for lr in found.lr)

    joint = suggest_rates(model, task(), ["LN1"], dict(clip=0.5, momentum=0.8, seed=3, clip_head="joint"), images=40)
    assert joint.step_rate[0] > found.step_rate[0]  # a clip that is shared is tighter
    adamw = suggest_rates(model, task(), ["LN1"], dict(optimizer="adamw"), images=40)
    assert adamw.step_rate[0] == pytest.approx(step_with_head(model, task(), ["LN1"], images=40).rates("adamw")[0])
    assert adamw.lr[0] == pytest.approx(0.1 * adamw.step_rate[0] ** 0.6, rel=0.06)


def test_the_head_is_trained_first_and_alone(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    step = step_with_head(model, task(), ["FC1"], images=48)
    fresh = vp.finetune(model, task(), "head", vp.FinetuneConfig(lr=1e-9, steps=1, eval_every=1)).model
    untrained = first_step(fresh, prepare(fresh, task().train.images), task().train.labels, ["FC1"])
    assert step.loss < untrained.loss
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_all_selections_without_a_list_and_the_same_twice(model):
    one, other = (suggest_rates(model, task(), images=24) for _ in range(2))
    assert list(one.selection) == list(CHOICES) and one.equals(other) and (one.lr > 0).all()


def test_twins_move_by_the_square_of_their_factor(model):
    config = dict(clip=None)
    one, twin = (suggest_rates(m, task(), ["LN1"], config, images=24) for m in (model, rescale(model, LN1=8)))
    assert twin.step_rate[0] == pytest.approx(64 * one.step_rate[0], rel=1e-4)
    assert twin.gain[0] == pytest.approx(one.gain[0], rel=1e-4)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(images=0), "images=0: expected a positive integer"),
        (dict(selections=["MHB"]), "MHB"),
        (dict(config=dict(lrr=1)), "lrr"),
        (dict(task="digitz"), "digitz"),
    ],
)
def test_what_does_not_fit(model, changes, match):
    with pytest.raises(ValueError, match=match):
        suggest_rates(**dict(model=model, task=task(), selections=["LN1"], images=8) | changes)
