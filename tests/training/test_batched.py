"""Runs trained together are the runs trained alone, whatever trains and however."""
import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_vit

import vitplast as vp
from vitplast.data import RandomCrops
from vitplast.models import KINDS, Selection, prepare
from vitplast.training import finetune_many, memory_per_run, saved_bytes
from vitplast.training.batched import Whole, loss_of, stack_runs

BASE = vp.FinetuneConfig(steps=20, eval_every=20, batch_size=8, clip=0.5, weight_decay=0.01)
SGD = [dataclasses.replace(BASE, lr=lr, seed=seed) for seed in (0, 3) for lr in (0.02, 0.3)]


def assert_same(together, alone, tolerance=1e-9):
    for name in ("task", "components", "config", "best_step", "validation_accuracy", "test_accuracy", "diverged", "n_trained"):
        assert getattr(together, name) == getattr(alone, name), name
    assert list(together.history.columns) == list(alone.history.columns)
    assert np.allclose(together.history, alone.history, rtol=1e-8, atol=tolerance, equal_nan=True)
    theirs = dict(alone.model.named_parameters())
    for n, p in together.model.named_parameters():
        assert (p - theirs[n]).abs().max() < tolerance, n
        assert p.requires_grad == theirs[n].requires_grad, n


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("what", [*KINDS, "all", "head"])
def test_together_as_alone(model, stripes, what, optimizer):
    configs = [dataclasses.replace(c, optimizer=optimizer, lr=c.lr / (1 if optimizer == "sgd" else 100)) for c in SGD]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for together, config in zip(finetune_many(model, stripes, what, configs), configs):
        assert_same(together, vp.finetune(model, stripes, what, config))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("change", [
    dict(accumulate=3), dict(watch=("MHA", "LN2")), dict(final_norm=True), dict(clip_head="joint"), dict(clip=None), dict(head_lr=0.05), dict(head_lr=0),
    dict(log_every=7, eval_every=5), dict(eval_every=3, warmup=0.0, momentum=0.0),
], ids=str)  # fmt: skip
def test_every_setting(model, stripes, change):
    configs = [dataclasses.replace(c, **change) for c in SGD]
    for together, config in zip(finetune_many(model, stripes, ["MHA", "LN1"], configs), configs):
        assert_same(together, vp.finetune(model, stripes, ["MHA", "LN1"], config))


@pytest.mark.parametrize("what", ["MHA.v", "MHA.bias+FC1@1", "all@-1:"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parts_and_blocks(model, stripes, what, optimizer):
    "Some rows of a tensor, some blocks; weight decay moves nothing that is frozen."
    configs = [dataclasses.replace(c, optimizer=optimizer, weight_decay=0.1, lr=c.lr / (1 if optimizer == "sgd" else 100)) for c in SGD]
    for together, config in zip(finetune_many(model, stripes, what, configs), configs):
        assert_same(together, vp.finetune(model, stripes, what, config))


def test_augmented_images_are_each_seeds_own(model, stripes):
    task = dataclasses.replace(stripes, augment=RandomCrops(16, torch.ones(64)))
    for together, config in zip(finetune_many(model, task, "FC2", SGD), SGD):
        assert_same(together, vp.finetune(model, task, "FC2", config))


def test_a_run_that_diverges_leaves_the_others_alone(model, stripes):
    configs = [dataclasses.replace(BASE, clip=1e300, eval_every=4, lr=lr, weight_decay=0.0) for lr in (0.05, 1e200, 0.02)]
    runs = finetune_many(model, stripes, "all", configs)
    assert [r.diverged for r in runs] == [False, True, False]
    for together, config in zip(runs, configs):
        assert_same(together, vp.finetune(model, stripes, "all", config)) if not together.diverged else None
    alone = vp.finetune(model, stripes, "all", configs[1])
    assert (runs[1].best_step, runs[1].test_accuracy, len(runs[1].history)) == (alone.best_step, alone.test_accuracy, len(alone.history))


def test_the_models_share_what_is_frozen(model, stripes):
    first, second = finetune_many(model, stripes, "LN1", SGD[:2])
    same = {n for n, p in first.model.named_parameters() if p is dict(second.model.named_parameters())[n]}
    chosen = {n for n, p in first.model.named_parameters() if p.requires_grad}
    assert same and not same & chosen and same | chosen == {n for n, _ in first.model.named_parameters()}


def test_groups_and_models_that_cannot_be_stacked(model, stripes):
    with pytest.raises(ValueError, match=r"runs of a group differ in \['clip', 'steps'\]: expected differences in \('lr', 'seed'\) only"):
        finetune_many(model, stripes, "MHA", [BASE, dataclasses.replace(BASE, steps=3, clip=1.0)])
    for kwargs in (dict(proj_drop_rate=0.3), dict(drop_path_rate=0.3)):
        with pytest.raises(ValueError, match="draws random numbers .*: expected runs one by one"):
            finetune_many(tiny_vit(**kwargs), stripes, "MHA", SGD)


def test_memory_grows_by_what_is_stated(model, stripes):
    """Counted at 1 and 5 runs under vmap: the slope is the estimate of one run."""
    def counted(n):
        configs = [dataclasses.replace(BASE, seed=s) for s in range(n)]
        base = tiny_vit()
        stacked, *_ = stack_runs(base, stripes, Selection.of("MHA", base), configs)
        for p in base.parameters():
            p.requires_grad_(False)
        weights = {f"model.{k}": p for k, p in stacked.items()}
        images, labels = prepare(base, stripes.train.images[:8]), stripes.train.labels[:8]
        return saved_bytes(lambda: loss_of(Whole(base), weights, images.expand(n, -1, -1, -1, -1), labels.expand(n, -1), False)) + 4 * sum(p.nbytes for p in weights.values())

    slope = (counted(5) - counted(1)) / 4
    assert 0.7 < memory_per_run(model, stripes, "MHA", BASE) / slope < 1.6
    assert memory_per_run(model, stripes, "head", BASE) < memory_per_run(model, stripes, "LN2", BASE) < memory_per_run(model, stripes, "all", BASE)
    halves = memory_per_run(model, stripes, "MHA", dataclasses.replace(BASE, accumulate=2))
    assert halves < memory_per_run(model, stripes, "MHA", BASE)
