"""Rates for an optimizer that exists: every step is the one that groups with these rates from the beginning would have made."""
import copy
import itertools

import pytest
import torch
from conftest import noise, tiny_vit
from torch.optim import SGD, Adagrad, AdamW, lr_scheduler as s

from vitplast.choosing import param_groups, set_rates
from vitplast.choosing.regroup import check_held, check_kept

RATES, HEAD = {"MHA@1": 0.002, "LN1": 0.03}, 0.01
START = 0.05  # of the optimizer that exists
SCHEDULES = {
    "none": lambda o: None,
    "LambdaLR": lambda o: s.LambdaLR(o, lambda t: min(1, t / 3)),
    "a function per group": lambda o: s.LambdaLR(o, [{0.01: lambda t: 1 / (1 + t), 0.0: lambda t: 0.5**t}[g["weight_decay"]] for g in o.param_groups]),
    "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: s.StepLR(o, 3),
    "MultiStepLR": lambda o: s.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: s.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: s.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: s.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: s.PolynomialLR(o, 6, 2),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 6, eta_min=0.0001),
    "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 3, eta_min=0.0001),
    "ReduceLROnPlateau": lambda o: s.ReduceLROnPlateau(o, patience=0, min_lr=[0.0001] * len(o.param_groups)),
    "SequentialLR": lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, total_iters=2), s.CosineAnnealingLR(o, 5)], [2]),
    "two milestones": lambda o: s.SequentialLR(o, [s.ConstantLR(o, 0.1, 2), s.ExponentialLR(o, 0.9), s.StepLR(o, 2)], [2, 4]),
    "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 2), s.ExponentialLR(o, 0.9)]),
}


def decayed(model, members) -> dict:
    "Parameters as two groups: matrices with weight decay, all else without."
    members = list(members)
    groups = [{"params": [p for p in members if (p.ndim > 1) == big], "weight_decay": 0.01 * big} for big in (True, False)]
    return [g for g in groups if g["params"]]


def existing(model, kind=AdamW):
    return kind(decayed(model, model.parameters()), lr=START)


def fresh(model, kind=AdamW):
    "The same optimizer, with the rates of the selections from the beginning."
    groups = param_groups(model, RATES, HEAD)
    return kind([part | {"lr": g["lr"]} for g in groups for part in decayed(model, g["params"])])


def rates_of(model, optimizer) -> dict:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def advance(model, optimizer, schedule, i):
    model(noise(4, seed=i)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if isinstance(schedule, s.ReduceLROnPlateau):
        schedule.step(1.0)
    elif schedule:
        schedule.step()


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_are_those_of_groups_from_the_beginning(name, kind):
    model = tiny_vit(num_classes=3)
    other = copy.deepcopy(model)
    mine, wanted = existing(model, kind), fresh(other, kind)
    plans = SCHEDULES[name](mine), SCHEDULES[name](wanted)
    set_rates(mine, [plans[0]] if plans[0] else [], param_groups(model, RATES, HEAD))
    for i in range(9):
        found, right = rates_of(model, mine), rates_of(other, wanted)
        assert found.keys() == right.keys()
        for n in right:
            assert found[n] == pytest.approx(right[n], rel=1e-12, abs=1e-18), (i, n)
        if plans[0]:
            assert sorted(plans[0].get_last_lr()) == pytest.approx(sorted(plans[1].get_last_lr()), rel=1e-12)
        advance(model, mine, plans[0], i)
        advance(other, wanted, plans[1], i)
    for (n, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    start = dict(tiny_vit(num_classes=3).named_parameters())
    assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == trained


def test_names_are_told_apart_and_follow_their_parameters():
    model = tiny_vit(num_classes=3)
    optimizer = AdamW(model.named_parameters(), lr=START)
    set_rates(optimizer, [], param_groups(model, RATES, HEAD))
    own = {id(p): n for n, p in model.named_parameters()}
    for g in optimizer.param_groups:
        assert g["param_names"] == [own[id(p)] for p in g["params"]]
    optimizer = existing(tiny := tiny_vit(num_classes=3))
    set_rates(optimizer, [], param_groups(tiny, RATES, HEAD))
    names = [g["name"] for g in optimizer.param_groups]
    assert len(set(names)) == len(names) and names[0] == "MHA@1"
    assert {n.split(" (")[0] for n in names} == {*RATES, "head"}


def test_state_of_what_is_frozen_goes():
    model = tiny_vit(num_classes=3)
    optimizer = Adagrad(model.parameters(), lr=START)
    set_rates(optimizer, [], param_groups(model, RATES, HEAD))
    kept = sum(len(g["params"]) for g in optimizer.param_groups)
    assert len(optimizer.state_dict()["state"]) == kept < len(list(model.parameters()))


class Foreign(s.LambdaLR):
    pass


REFUSED = {
    "OneCycleLR": (lambda o: s.OneCycleLR(o, 0.1, 10), "OneCycleLR has rates of its own: expected another schedule"),
    "CyclicLR": (lambda o: s.CyclicLR(o, 0.01, 0.1), "CyclicLR has rates of its own"),
    "foreign": (lambda o: Foreign(o, lambda t: 1), "Foreign is no schedule of torch.optim.lr_scheduler.*param_groups"),
    "inside": (lambda o: s.ChainedScheduler([Foreign(o, lambda t: 1)]), "Foreign is no schedule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_schedules_that_cannot_follow_are_refused_and_nothing_is_changed(name):
    make, message = REFUSED[name]
    model = tiny_vit(num_classes=3)
    optimizer = SGD(model.parameters(), lr=START, momentum=0.9)
    schedule, before = make(optimizer), len(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=message):
        set_rates(optimizer, [schedule], param_groups(model, RATES))
    assert [len(g["params"]) for g in optimizer.param_groups] == [before]


def test_groups_that_are_right_are_left_alone_under_any_schedule():
    model = tiny_vit(num_classes=3)
    groups = param_groups(model, RATES, HEAD)
    optimizer = SGD([dict(g) for g in groups])
    schedule = Foreign(optimizer, lambda t: (1 + t) / 7)
    kept = list(optimizer.param_groups)
    set_rates(optimizer, [schedule], groups)
    assert all(a is b for a, b in itertools.zip_longest(kept, optimizer.param_groups))


def test_optimizers_that_know_no_groups_or_no_rate():
    model = tiny_vit(num_classes=3)
    groups = param_groups(model, RATES)
    with pytest.raises(ValueError, match="LBFGS has one rate"):
        set_rates(torch.optim.LBFGS(model.parameters()), [], groups)
    with pytest.raises(ValueError, match="own rate is 0"):
        set_rates(SGD(model.parameters(), lr=0.0), [], groups)


def test_what_an_optimizer_lacks_and_what_a_checkpoint_brings():
    model = tiny_vit(num_classes=3)
    groups = param_groups(model, RATES, HEAD)
    with pytest.raises(ValueError, match="lacks 4 of 4 tensors of 'MHA@1'"):
        check_held([SGD(model.head.parameters(), lr=1)], groups)
    check_held([SGD(model.head.parameters(), lr=1), SGD([p for p in model.parameters() if p.requires_grad][:-2], lr=1)], groups)
    optimizer = existing(model)
    s.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match="MHA@1 is to train at 0.002, and the checkpoint has 0.05"):
        check_kept(SGD([{"params": groups[0]["params"], "initial_lr": START}], lr=START), groups)
    set_rates(optimizer, [], groups)
    check_kept(optimizer, groups)
