"""Finetuning: what is frozen stays, what trains moves, selection on validation, one update by hand."""
import copy
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import vitplast as vp
from vitplast.files import key, settings
from vitplast.data import Split
from vitplast.models import KINDS, chosen_places, prepare
from vitplast.training import finetune_many, image_order, new_head, warmup_cosine
from vitplast.training.finetune import evaluate
from vitplast.training.probe import fit_head

FAST = vp.FinetuneConfig(steps=12, eval_every=4, batch_size=8, lr=0.05)
WHAT = [*KINDS, "all", "head"]


def expected_names(model, what):
    "Independent of the adapters: timm's own names."
    part = {"LN1": ".norm1.", "MHA": ".attn.", "LN2": ".norm2.", "FC1": ".mlp.fc1.", "FC2": ".mlp.fc2."}
    names = [n for n, _ in model.named_parameters()]
    return {n for n in names if n.startswith("head.") or what == "all" or (what in part and part[what] in n)}


@pytest.mark.parametrize("what", WHAT)
def test_frozen_parameters_keep_every_bit_and_trained_ones_get_gradients(model, stripes, what):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = vp.finetune(model, stripes, what, FAST)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the model that went in
    after, chosen = dict(run.model.named_parameters()), expected_names(run.model, what)
    for name, p in after.items():
        if name in chosen:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
            if name.endswith("attn.qkv.bias"):  # softmax does not see a key bias: queries and values must move
                moved = (p != before[name]).view(3, -1).any(1)
                assert moved[0] and moved[2], name
            elif name in before:
                assert not torch.equal(p, before[name]), name
        else:
            assert p.grad is None and torch.equal(p, before[name]), name
    assert run.n_trained == sum(after[n].numel() for n in chosen)


@pytest.mark.parametrize("what", WHAT)
def test_trainable_matches_and_restores(what):
    model = tiny_vit(num_classes=3)
    model.norm.weight.requires_grad_(False)
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    with vp.trainable(model, [what]) as training:
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(training.names) == expected_names(model, what)
        assert f"{len(training.names)} tensors train" in repr(training)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state
    vp.trainable(model, [what])  # the plain call lasts
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected_names(model, what)


def test_single_components_and_the_final_norm_can_be_chosen():
    model = tiny_vit(num_classes=3)
    second = [c for c in vp.components(model) if c.block == 1 and c.kind == "FC1"]
    names = lambda *args, **kwargs: set(vp.trainable(model, *args, head=False, **kwargs).names)
    assert names(second) == {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"}
    assert names("LN1", final_norm=True) - names("LN1") == {"norm.weight", "norm.bias"}
    assert names(["LN1", "LN2", "LN1"]) == {n for n, _ in model.named_parameters() if ".norm" in n}


def test_head_and_final_norm_are_given_by_name():
    "vp.trainable(model, 'MHA', 'FC1') once took FC1 for `head`, silently."
    with pytest.raises(TypeError, match="positional"):
        vp.trainable(tiny_vit(num_classes=3), "MHA", "FC1")


@pytest.mark.parametrize("components, message", [
    (["MHSA"], "selection 'MHSA': 'MHSA' at character 1: expected LN1, .*nearest: MHA"), (["heads"], "nearest: head"), (["al"], "nearest: all"),
    ([], "expected some of"), (["head"], "nothing to train in this model .it has no head"), ("MHA@2", "'2' at character 5: expected 0 to 1.*the model has 2 blocks"),
    (vp.components(tiny_vit(num_classes=3))[1], "belongs to another model: expected items of vp.components"),
])  # fmt: skip
def test_a_selection_that_matches_nothing(model, components, message):
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        vp.trainable(model, components)
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("settings", [{}, {"clip_head": "joint"}, {"clip": None}, {"head_lr": 0.02}, {"head_lr": 0.02, "clip_head": "joint"}], ids=str)
def test_updates_by_hand(model, stripes, settings):
    """Four steps of SGD with momentum, warm-up, clipping of head and component apart or together, in plain float64 formulas."""
    config = vp.FinetuneConfig(**dict(steps=4, eval_every=4, batch_size=8, lr=0.3, warmup=0.5, clip=0.05, weight_decay=0.01, momentum=0.8) | settings)
    reference = tiny_vit()
    new_head(reference, 2, config.seed)
    names = [n for n in dict(reference.named_parameters()) if ".attn." in n or n.startswith("head.")]
    rows, velocity = image_order(64, 4, 8, 0), {n: 0 for n in names}
    for step, lr in enumerate((0.15, 0.3, 0.3, 0.15)):  # two steps of warm-up, then a half cosine
        parameters = dict(reference.named_parameters())
        loss = F.cross_entropy(reference(prepare(reference, stripes.train.images[rows[step]])), stripes.train.labels[rows[step]])
        gradients = dict(zip(names, torch.autograd.grad(loss, [parameters[n] for n in names])))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        component_norm = math.sqrt(sum(g.square().sum().item() for n, g in gradients.items() if "attn" in n))
        head_norm = math.sqrt(norm**2 - component_norm**2)
        with torch.no_grad():
            for n in names:
                of = norm if config.clip_head == "joint" else component_norm if "attn" in n else head_norm
                factor = 1 if config.clip is None else min(1, config.clip / (of + 1e-6))
                velocity[n] = 0.8 * velocity[n] + gradients[n] * factor + 0.01 * parameters[n]
                own = config.head_lr / config.lr if config.head_lr and n.startswith("head.") else 1
                parameters[n] -= lr * own * velocity[n]
        if step == 0:
            first_norm, first_loss = component_norm, loss.item()
    run = vp.finetune(model, stripes, "MHA", config)
    for n, p in run.model.named_parameters():
        assert torch.allclose(p, dict(reference.named_parameters())[n], atol=1e-12), n
    assert np.isclose(run.history.grad_norm[0], first_norm, rtol=1e-9) and np.isclose(run.history.loss[0], first_loss, rtol=1e-9)
    assert np.allclose(run.history.lr, [0.15, 0.3, 0.3, 0.15])
    assert np.isclose(math.hypot(run.history.grad_norm[3], run.history.head_grad_norm[3]), norm, rtol=1e-9)


def test_a_run_is_the_same_twice_and_another_with_another_seed(model, stripes):
    first, second = (vp.finetune(model, stripes, "FC1", FAST) for _ in range(2))
    torch.manual_seed(123)
    third = vp.finetune(model, stripes, "FC1", FAST)
    assert first.history.equals(second.history) and first.history.equals(third.history) and first.test_accuracy == third.test_accuracy
    other = vp.finetune(model, stripes, "FC1", vp.FinetuneConfig(**{**vars(FAST), "seed": 1}))
    assert not first.history.loss.equals(other.history.loss)


def test_dropout_draws_from_the_runs_own_seed(stripes):
    model = tiny_vit(proj_drop_rate=0.3, drop_path_rate=0.3)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        losses.append(vp.finetune(model, stripes, "FC2", FAST).history.loss)
        assert torch.equal(state, torch.random.get_rng_state())
    assert losses[0].equals(losses[1])


def test_frozen_batch_norms_keep_their_statistics(stripes):
    class Stem(torch.nn.Module):
        "A patch embedding behind a batch norm, as in timm's hybrid models."
        def __init__(self, embed):
            super().__init__()
            self.norm, self.embed = torch.nn.BatchNorm2d(3).double(), embed
            self.img_size = embed.img_size

        def forward(self, x):
            return self.embed(self.norm(x))

    model = tiny_vit()
    model.patch_embed = Stem(model.patch_embed)
    for what, frozen in (("MHA", True), ("all", False)):
        run = vp.finetune(model, stripes, what, FAST)
        assert torch.equal(run.model.patch_embed.norm.running_mean, model.patch_embed.norm.running_mean) == frozen
        assert evaluate(run.model, stripes.validation)[1] == run.validation_accuracy  # statistics of the best step too


def test_validation_picks_the_step_and_the_model_is_that_of_the_step(model, stripes):
    run = vp.finetune(model, stripes, "all", vp.FinetuneConfig(steps=30, eval_every=3, batch_size=8, lr=0.5))
    read = run.history.dropna(subset="validation_accuracy")
    assert list(read.step) == list(range(3, 31, 3))
    assert run.validation_accuracy == read.validation_accuracy.max() and run.best_step == read.step[read.validation_accuracy.idxmax()]
    assert evaluate(run.model, stripes.validation)[1] == run.validation_accuracy
    assert evaluate(run.model, stripes.test)[1] == run.test_accuracy


def test_the_test_split_is_read_once(model, stripes, monkeypatch):
    import sys

    module, read = sys.modules["vitplast.training.finetune"], []
    monkeypatch.setattr(module, "evaluate", lambda m, split, **kw: read.append(split) or evaluate(m, split, **kw))
    vp.finetune(model, stripes, "head", FAST)
    assert sum(s is stripes.test for s in read) == 1 and read[-1] is stripes.test


def test_accuracy_counts_images_with_a_ragged_last_batch(model, stripes):
    new_head(model, 2, 0)
    with torch.no_grad():
        logits = model(prepare(model, stripes.test.images))
    for size in (5, 36, 37, 1000):
        loss, accuracy = evaluate(model, stripes.test, batch_size=size)
        assert accuracy == accuracy_score(stripes.test.labels, logits.argmax(1))
        assert np.isclose(loss, F.cross_entropy(logits, stripes.test.labels).item())


def test_learning_happens(model, stripes):
    run = vp.finetune(model, stripes, "all", vp.FinetuneConfig(steps=60, eval_every=20, lr=0.1))
    assert run.test_accuracy > 0.9 and run.history.loss[-5:].mean() < 0.5 * run.history.loss[:5].mean()


def test_a_run_that_diverges_says_so(model, stripes):
    run = vp.finetune(model, stripes, "all", vp.FinetuneConfig(steps=30, eval_every=2, lr=1e200, clip=1e300))
    assert run.diverged and len(run.history) < 30 and 0 <= run.test_accuracy <= 1
    assert run.record()["diverged"] is True


@pytest.mark.parametrize("steps, warmup", [(1, 0.0), (1, 0.9), (10, 0.0), (100, 0.2), (7, 0.99)])
def test_the_schedule_starts_above_zero_and_never_exceeds_one(steps, warmup):
    factors = [warmup_cosine(s, steps, warmup) for s in range(steps)]
    assert factors[0] > 0 and max(factors) == 1 and min(factors) >= 0


@pytest.mark.parametrize("kwargs, message", [
    (dict(lr=0), "lr=0: expected a positive number"), (dict(lr=math.nan), "lr=nan"), (dict(steps=0), "steps=0: expected a positive integer"),
    (dict(batch_size=2.5), "batch_size=2.5"), (dict(momentum=1), r"momentum=1: expected a number in \[0, 1\)"), (dict(weight_decay=-1), "weight_decay=-1"),
    (dict(steps=True), "steps=True: expected a positive integer"), (dict(seed=1.5), "seed=1.5: expected a whole number"), (dict(seed=10**20), "seed=1000+: expected"),
    (dict(lr="0.1"), "lr='0.1': expected a positive number"), (dict(lr=True), "lr=True"), (dict(weight_decay=math.inf), "weight_decay=inf: expected a number"), (dict(final_norm="no"), "final_norm='no': expected True or False"),
    (dict(momentum="x"), "momentum='x': expected a number"), (dict(head_lr="0.1"), "head_lr='0.1': expected None"), (dict(clip=0), "clip=0: expected a positive number, or None"), (dict(bf16=1), "bf16=1: expected True, False or .auto."), (dict(bf16="yes"), "bf16='yes': expected True, False"),
    (dict(optimizer="adam"), "optimizer=.adam.: expected one of"), (dict(accumulate=33), "accumulate=33: expected at most batch_size=32"), (dict(watch=["MHSA"]), "watch=.*: expected some of"),
])  # fmt: skip
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vp.FinetuneConfig(**kwargs)


def test_settings_from_a_dictionary():
    assert vp.FinetuneConfig.from_dict(vars(FAST)) == FAST
    with pytest.raises(ValueError, match="unknown setting 'learning_rate'"):
        vp.FinetuneConfig.from_dict({"learning_rate": 1})
    with pytest.raises(ValueError, match="unknown setting 'step'; nearest known: .'steps'"):
        vp.FinetuneConfig.from_dict({"step": 1})


def test_images_of_another_size_are_refused(stripes):
    for call in (lambda m: vp.finetune(m, stripes, "MHA"), lambda m: vp.linear_probe(m, stripes)):
        with pytest.raises(ValueError, match=r"task 'stripes' has images \(3, 16, 16\), the model takes \(3, 24, 24\)"):
            call(tiny_vit(img_size=24))


def test_linear_probe_against_a_scikit_learn_pipeline(model, stripes):
    def features(split):
        with torch.no_grad():
            x = model._pos_embed(model.patch_embed(prepare(model, split.images)))
            for block in model.blocks:
                x = block(x)
        x = x.mean(1)
        return (x / x.norm(dim=1, keepdim=True)).numpy()

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(features(stripes.train), stripes.train.labels)
    assert vp.linear_probe(model, stripes) == pipeline.score(features(stripes.test), stripes.test.labels)


def test_adamw_is_torchs(model, stripes):
    config = vp.FinetuneConfig(steps=5, eval_every=5, batch_size=8, lr=0.01, optimizer="adamw", weight_decay=0.1, clip=1e9, warmup=0.0)
    reference = tiny_vit()
    new_head(reference, 2, config.seed)
    chosen = vp.trainable(reference, "FC2").chosen
    rule, rows = torch.optim.AdamW(chosen.values(), lr=config.lr, betas=(0.9, 0.999), weight_decay=0.1), image_order(64, 5, 8, 0)
    for step in range(5):
        rule.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * (max(step, 1) - 1) / 4))  # one step of warm-up at least
        rule.zero_grad()
        F.cross_entropy(reference(prepare(reference, stripes.train.images[rows[step]])), stripes.train.labels[rows[step]]).backward()
        rule.step()
    run = vp.finetune(model, stripes, "FC2", config)
    for n, p in run.model.named_parameters():
        assert torch.allclose(p, dict(reference.named_parameters())[n], atol=1e-12), n


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_accumulation_gives_the_update_of_the_large_batch(model, stripes, pieces):
    whole = vp.finetune(model, stripes, "MHA", FAST)
    parts = vp.finetune(model, stripes, "MHA", vp.FinetuneConfig(**{**vars(FAST), "accumulate": pieces}))
    assert np.allclose(whole.history, parts.history, rtol=1e-9, equal_nan=True)
    for p, q in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.allclose(p, q, atol=1e-12)


def test_gradients_of_frozen_components_are_recorded_when_asked_for(model, stripes):
    plain = vp.finetune(model, stripes, "LN1", FAST)
    watched = vp.finetune(model, stripes, "LN1", vp.FinetuneConfig(**{**vars(FAST), "watch": ["FC1", "LN1"]}))
    assert np.array_equal(watched.history.grad_norm_LN1, watched.history.grad_norm)
    assert watched.history[plain.history.columns].equals(plain.history)  # watching changes nothing
    reference = tiny_vit()
    new_head(reference, 2, 0)
    rows = image_order(64, 1, 8, 0)[0]
    F.cross_entropy(reference(prepare(reference, stripes.train.images[rows])), stripes.train.labels[rows]).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for n, p in reference.named_parameters() if ".fc1." in n))
    assert np.isclose(watched.history.grad_norm_FC1[0], norm, rtol=1e-9)
    after = dict(watched.model.named_parameters())
    assert after["blocks.0.mlp.fc1.weight"].grad is None and not after["blocks.0.mlp.fc1.weight"].requires_grad
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight)


def test_the_history_averages_and_loses_no_reading(model, stripes):
    full = vp.finetune(model, stripes, "FC1", FAST).history
    short = vp.finetune(model, stripes, "FC1", vp.FinetuneConfig(**{**vars(FAST), "log_every": 5})).history
    assert list(short.step) == [4, 5, 8, 10, 12] and list(short.lr) == list(full.lr[[3, 4, 7, 9, 11]])
    assert np.isclose(short.loss[2], full.loss[5:8].mean()) and np.isclose(short.grad_norm[0], full.grad_norm[:4].mean())
    assert short.dropna().validation_accuracy.tolist() == full.dropna().validation_accuracy.tolist()


def test_what_is_meant_is_taken_and_what_is_not_is_said(model, stripes):
    config = {"steps": 2, "eval_every": 2}
    small = vp.load("formula-vit-tiny")
    assert vp.finetune(small, "digits", "head", config).task == "digits"
    assert vp.linear_probe(small, "digits") == vp.linear_probe(small, vp.task("digits"))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            run = vp.finetune(model, stripes, "LN1", config)
        assert run.history.equals(vp.finetune(model, stripes, "LN1", vp.FinetuneConfig(**config)).history)
    for task, wrong, kind, message in [
        (stripes, {"step": 2}, ValueError, "setting .step.; nearest known: .*steps"), (stripes, 0.1, TypeError, "config 0.1 is a float: expected a vp.FinetuneConfig"),
        (stripes, {"batch_size": 10**7}, ValueError, "batch_size=10000000: the task has 64 training images, expected at most 256"),
        (3, {}, TypeError, "task 3 is a int: expected what vp.task gives, or its name"), ("digist", {}, ValueError, "unknown task 'digist'.*nearest known: .'digits'"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            vp.finetune(model if task is stripes else small, task, "LN1", wrong)


def test_two_spellings_of_a_number_are_one_run():
    runs = [vp.FinetuneConfig(lr=a, clip=b, steps=c, weight_decay=d) for a, b, c, d in ((1, 1, 10, 0), (1.0, 1.0, 10, 0.0), (np.float64(1), np.float64(1), np.int64(10), np.float64(0)))]
    assert len(set(runs)) == 1 and len({key(settings(r)) for r in runs}) == 1


def test_bfloat16_and_compiled_runs_are_close_to_plain_ones(model, stripes):
    single = model.float()
    plain = vp.finetune(single, stripes, "all", FAST)
    rough = vp.finetune(single, stripes, "all", vp.FinetuneConfig(**{**vars(FAST), "bf16": True}))
    assert 0 < (plain.history.loss - rough.history.loss).abs().max() < 0.1
    assert rough.model.blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_a_head_that_is_fitted_and_fixed(model, stripes):
    """A logistic regression on what the head receives, found by scikit-learn: its coefficients, folded with the scaler, stay to the last bit."""
    config = vp.FinetuneConfig(**{**vars(FAST), "head_lr": 0})
    run = vp.finetune(model, stripes, "MHA", config)
    reference = tiny_vit()
    new_head(reference, 2, 0)
    with torch.no_grad():
        x = reference.forward_head(reference.forward_features(prepare(reference, stripes.train.images)), pre_logits=True).numpy()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, stripes.train.labels)
    logits = torch.from_numpy(x) @ run.model.head.weight.T + run.model.head.bias
    assert np.allclose(logits.softmax(1).detach(), pipeline.predict_proba(x), atol=1e-9)
    assert run.n_trained == sum(p.numel() for c in vp.components(model) if c.kind == "MHA" for p in c.parameters.values())
    assert run.history.head_grad_norm.isna().all() and not run.model.head.weight.requires_grad
    everything = vp.finetune(model, stripes, "all", config)
    assert torch.equal(everything.model.head.weight, run.model.head.weight) and everything.components == "all"
    assert not torch.equal(everything.model.patch_embed.proj.weight, model.patch_embed.proj.weight)
    with pytest.raises(ValueError, match="nothing to train"):
        vp.finetune(model, stripes, "head", config)


def test_a_fitted_head_of_several_classes(model, stripes):
    labels = torch.arange(64) % 4
    task = vp.Task("four", tuple("abcd"), Split(stripes.train.images, labels), stripes.validation, stripes.test, test_sources=37)
    reference = tiny_vit(num_classes=4)
    with torch.no_grad():
        x = reference.forward_head(reference.forward_features(prepare(reference, task.train.images)), pre_logits=True).numpy()
    fit_head(reference, task)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, labels)
    logits = torch.from_numpy(x) @ reference.head.weight.T + reference.head.bias
    assert np.allclose(logits.softmax(1).detach(), pipeline.predict_proba(x), atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rows_of_a_tensor_train_and_the_others_keep_every_bit(model, stripes, optimizer):
    "Also under weight decay, which moves weights that have no gradient."
    config = vp.FinetuneConfig(**{**vars(FAST), "weight_decay": 0.1, "optimizer": optimizer})
    run = vp.finetune(model, stripes, "MHA.v@1", config)
    for name, p in run.model.named_parameters():
        if name.startswith("head."):
            continue
        moved = (p != dict(model.named_parameters())[name])
        if name.startswith("blocks.1.attn.qkv."):
            assert moved.view(3, 12, -1).any(2).tolist() == [[False] * 12, [False] * 12, [True] * 12]
        else:
            assert not moved.any(), name
    assert run.n_trained == 12 * 13 + 2 * 13 and run.components == "MHA.v@1"
    by_hand = run.model.blocks[1].attn.qkv.weight.grad[24:].square().sum() + run.model.blocks[1].attn.qkv.bias.grad[24:].square().sum()
    assert float(by_hand) ** 0.5 == pytest.approx(min(1, run.history.grad_norm.iloc[-1]), rel=1e-9) and (run.model.blocks[1].attn.qkv.weight.grad[:24] == 0).all()


def test_a_model_of_which_parts_train_is_saved_like_any_other(stripes, tmp_path):
    model = tiny_vit(num_classes=2)
    training, outside = vp.trainable(model, "MHA.v"), vp.trainable(model, "LN1")
    with vp.trainable(model, "MHA.v"):
        torch.save(model, tmp_path / "masked.pt")
    assert not model.blocks[0].attn.qkv.weight.requires_grad and training.masks and not outside.masks
    assert torch.load(tmp_path / "masked.pt", weights_only=False).blocks[0].attn.qkv.weight.shape == (36, 12)
    run = vp.finetune(model, stripes, "MHA.v", FAST)
    run.model(prepare(model, stripes.test.images[:2])).sum().backward()
    assert (run.model.blocks[0].attn.qkv.weight.grad[:24] != 0).any()  # the model that comes back is a model and no half of one


def test_the_trained_part_ends_with_the_context():
    model = tiny_vit(num_classes=3)
    qkv, x = model.blocks[0].attn.qkv.weight, torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def rows() -> list:
        model.zero_grad()
        model(x).square().sum().backward()
        return (qkv.grad.view(3, -1) != 0).any(1).tolist()

    with vp.trainable(model, "MHA.v"):
        assert rows() == [False, False, True]
        with vp.trainable(model, "MHA.q+MHA.k"):
            assert rows() == [True, True, False]
        assert rows() == [False, False, True]
    assert rows() == [True, True, True]
    vp.trainable(model, "MHA.v")
    vp.trainable(model, "MHA.qkv")  # the later call is the one that counts
    assert rows() == [True, True, True] and chosen_places("MHA.qkv", model)["blocks.0.attn.qkv.weight"] is None


@pytest.mark.parametrize("faster", [True, False])
def test_bf16_by_timing_is_one_of_the_two_and_said(model, stripes, monkeypatch, faster):
    single = model.float()
    module = sys.modules["vitplast.training.finetune"]
    asked = []
    monkeypatch.setattr(module, "TIMED", {})
    monkeypatch.setattr(module, "seconds_of_a_step", lambda logits, images, bf16: asked.append(bf16) or (1.0 if bf16 == faster else 2.0))
    auto = vp.finetune(single, stripes, "LN1", vp.FinetuneConfig(**{**vars(FAST), "bf16": "auto"}))
    told = vp.finetune(single, stripes, "LN1", vp.FinetuneConfig(**{**vars(FAST), "bf16": faster}))
    assert auto.bf16 == told.bf16 == faster and auto.config.bf16 == "auto" and auto.record()["bf16"] == faster
    assert auto.history.equals(told.history) and auto.test_accuracy == told.test_accuracy
    (many,) = finetune_many(single, stripes, "LN1", [auto.config])
    assert many.bf16 == faster and many.history.loss.tolist() == pytest.approx(told.history.loss.tolist(), rel=1e-3 if not faster else 2e-2)
    assert asked == [False, True, False]  # once per process, whoever asks


def test_timing_leaves_no_trace(model):
    single = model.float()
    module = sys.modules["vitplast.training.finetune"]
    module.TIMED.clear()
    state, before = torch.get_rng_state(), [p.clone() for p in single.parameters()]
    config = module.decided(single, vp.FinetuneConfig(batch_size=4, bf16="auto"))
    assert isinstance(config.bf16, bool) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, single.parameters()))


def test_class_weights_are_scikit_learns_and_enter_the_loss(stripes):
    from sklearn.utils.class_weight import compute_class_weight

    train = stripes.train
    keep = torch.cat([(train.labels == 0).nonzero().flatten(), (train.labels == 1).nonzero().flatten()[:5]])
    uneven = replace(stripes, train=Split(train.images[keep], train.labels[keep]))
    labels = uneven.train.labels.numpy()
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    config = vp.FinetuneConfig(steps=1, eval_every=1, batch_size=len(keep), class_weights=True, lr=1e-9)
    found = sys.modules["vitplast.training.finetune"].weights_of(uneven, config)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found[uneven.train.labels].mean().item() == pytest.approx(1)
    model = tiny_vit(num_classes=3)
    run = vp.finetune(model, uneven, "head", config)
    headed = copy.deepcopy(model)
    new_head(headed, 2, config.seed)
    with torch.no_grad():
        each = F.cross_entropy(headed(prepare(headed, uneven.train.images)), uneven.train.labels, reduction="none")
    assert run.history.loss[0] == pytest.approx((each * found[uneven.train.labels]).mean().item(), rel=1e-6)


def test_patience_stops_after_readings_that_are_no_better(stripes):
    config = dict(steps=40, eval_every=2, batch_size=8, lr=0.1)
    whole = vp.finetune(tiny_vit(num_classes=3), stripes, "MHA", vp.FinetuneConfig(**config))
    run = vp.finetune(tiny_vit(num_classes=3), stripes, "MHA", vp.FinetuneConfig(**config, patience=2))
    read = whole.history[whole.history.validation_accuracy.notna()]
    best, misses, last = -1.0, 0, None
    for step, accuracy in zip(read.step, read.validation_accuracy):
        best, misses = (accuracy, 0) if accuracy > best else (best, misses + 1)
        last = step
        if misses == 2:
            break
    assert last < 40 and run.history.step.iloc[-1] == last and run.best_step == last - 4
    np.testing.assert_allclose(run.history.loss, whole.history.loss[: len(run.history)])


def test_runs_with_patience_are_not_batched(stripes):
    configs = [vp.FinetuneConfig(steps=2, eval_every=1, batch_size=8, lr=lr, patience=1) for lr in (0.1, 0.2)]
    with pytest.raises(ValueError, match="one by one"):
        finetune_many(tiny_vit(num_classes=3), stripes, "LN1", configs)
