"""Criteria against independent computations: gradients of single pictures by torch.func, Jacobians by autograd, numpy's SVD."""
from functools import partial

import numpy as np
import pytest
import torch
from architectures import HEADED, SEQUENCES, build
from conftest import tiny_vit
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy, one_hot

import vitplast as vp
from vitplast.choosing.criteria import CRITERIA, FAMILIES, NOT_OF_NORMS
from vitplast.choosing.labelled import collected, in_turns, of_gradients, of_kernels, of_steps
from vitplast.choosing.matrices import gram, maps_of, matrices_of, squares
from vitplast.choosing.sample import Sample
from vitplast.choosing.unlabelled import of_inputs, of_pairs, of_weights
from vitplast.data import RandomCrops, Split, Task
from vitplast.models import anatomy, watching
from vitplast.theory import first_step


def sample_of(model, n=12, seed=0, classes=None):
    "A sample of noise; labels at random."
    g, parts = torch.Generator().manual_seed(seed), anatomy(model)
    x, old = (torch.randn(n, *parts.image_shape, generator=g, dtype=torch.float64) for _ in "xy")
    with torch.no_grad():
        classes = classes or parts.logits(x[:1]).shape[1]
    return Sample(model, x, torch.randint(classes, (n,), generator=g), old, "noise")


def single_gradients(sample, component):
    "Gradients (N, parameters) of single pictures, by torch.func."
    model, fixed = sample.model, {n: p.detach() for n, p in sample.model.named_parameters()}
    own = {n: fixed[n] for n in component.parameters}

    def loss(changed, x, y):
        out = functional_call(model, fixed | changed, (x[None],))
        return cross_entropy(getattr(out, "logits", out), y[None])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = vmap(grad(loss), (None, 0, 0))(own, sample.images, sample.labels)
    return torch.cat([found[n].flatten(1) for n in component.parameters], 1)


@pytest.mark.parametrize("name", [n for n in HEADED if n not in SEQUENCES])
def test_products_of_gradients_without_gradients(name):
    sample = sample_of(build(name).eval(), 5)
    parts, seen = anatomy(sample.model), {}
    with watching(parts.components, lambda i, c, z, out: seen.update({i: (z.detach(), out)})):
        loss = cross_entropy(parts.logits(sample.images), sample.labels, reduction="sum")
    signals = torch.autograd.grad(loss, [seen[i][1] for i in range(len(seen))])
    for i, c in enumerate(parts.components):
        exact = single_gradients(sample, c)
        found = gram(c, seen[i][0], signals[i])
        torch.testing.assert_close(found, exact @ exact.T, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(squares(c, seen[i][0], signals[i]), found.diagonal())
        assert [m.W.shape for m in maps_of(c, seen[i][0])] == [W.shape for W in matrices_of(c)]


def test_gram_of_several_signals_is_the_sum_and_blocks_change_nothing(monkeypatch):
    c = anatomy(tiny_vit()).components[1]
    tokens, one, other = (torch.randn(6, 5, c.width, dtype=torch.float64) for _ in range(3))
    both = gram(c, tokens, one, other)
    torch.testing.assert_close(both, gram(c, tokens, one) + gram(c, tokens, other))
    monkeypatch.setattr("vitplast.choosing.matrices.LARGEST", 1)
    torch.testing.assert_close(gram(c, tokens, one, other), both)


@pytest.fixture(scope="module")
def sample():
    return sample_of(tiny_vit(num_classes=3, depth=2).eval(), 70)


def test_gradient_criteria(sample):
    found = of_gradients(sample)
    batches = sample.batches()
    assert len(batches) == 3
    for i, c in enumerate(sample.parts.components):
        singles = single_gradients(sample, c)
        p = torch.cat([t.detach().flatten() for t in c.parameters.values()])
        edges = np.cumsum([0, *(len(labels) for _, labels in batches)])
        of_batches = torch.stack([singles[a:b].mean(0) for a, b in zip(edges, edges[1:])])
        g = singles.mean(0)
        near = lambda name, value, rtol=1e-6: np.testing.assert_allclose(found[name][i], float(value), rtol=rtol, err_msg=name)
        near("gradient", g.norm())
        near("gradient l1", g.abs().sum())
        near("fisher", singles.square().sum(1).mean())
        near("fisher mean", singles.square().sum(1).mean() / len(p))
        near("batch squares", of_batches.square().sum())
        near("weight times gradient", (p * g).abs().sum())
        near("its mean", (p * g).abs().mean())
        sizes = [t.numel() for t in c.parameters.values()]
        ratios = [[a.norm() / w.norm() for a, w in zip(b.split(sizes), p.split(sizes))] for b in of_batches]
        near("relative gradient", np.mean(ratios))
        near("signal to noise", (g**2 / of_batches.var(0)).mean(), rtol=0.01)  # key biases: rounding over rounding
        rows = [t.view(q.shape).flatten(1).abs().amax(1) if q.ndim > 1 else t.abs() for t, q in zip(g.split(sizes), c.parameters.values())]
        near("row maximum", torch.cat(rows).mean())


def test_step_criteria_are_those_of_the_first_step(sample):
    found, frame = of_steps(sample), first_step(sample.model, sample.images, sample.labels).frame()
    np.testing.assert_allclose(found["gain of gradient step"], frame.gain)
    np.testing.assert_allclose(found["rate of sign step"], frame.sign_rate)


def test_kernels_are_those_of_jacobians(sample, monkeypatch):
    model, classes = sample.model, 3
    small = sample._replace(images=sample.images[:9], labels=sample.labels[:9])
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    logits = lambda own: functional_call(model, fixed | own, (small.images,))
    found = of_kernels(small, probes=400)
    p = logits({}).softmax(1)
    r = (one_hot(small.labels, classes) - p).flatten()
    features = model.forward_head(model.forward_features(small.images), pre_logits=True).detach()
    head = classes * (features @ features.T + 1)
    for i, c in enumerate(small.parts.components):
        J = jacrev(logits)({n: fixed[n] for n in c.parameters})
        J = torch.cat([J[n].flatten(2) for n in c.parameters], 2)  # (N, classes, parameters)
        K = torch.einsum("ikp,jkp->ij", J, J)
        np.testing.assert_allclose(found["kernel trace"][i], K.trace().item(), rtol=0.1)
        moved = J.flatten(0, 1).T @ r
        np.testing.assert_allclose(found["kernel alignment"][i], (moved @ moved / K.trace()).item(), rtol=0.1)
        full, targets = head + K, one_hot(small.labels, classes).double()
        ridge, error = 0.01 * full.diagonal().mean(), 0.0
        for k in range(9):
            rest = torch.arange(9) != k
            solved = torch.linalg.solve(full[rest][:, rest] + ridge * torch.eye(8), targets[rest])
            error += (targets[k] - full[k, rest] @ solved).square().sum().item() / 9
        np.testing.assert_allclose(found["low kernel error"][i], -error, rtol=0.05)
    monkeypatch.setattr("vitplast.choosing.labelled.LARGEST", 1)
    assert in_turns(small, 401) == [[i] for i in range(10)]
    turns = of_kernels(small, probes=2)
    monkeypatch.undo()
    for name, values in of_kernels(small, probes=2).items():
        np.testing.assert_allclose(turns[name], values, rtol=1e-9)
    assert len(collected(small, [0, 3], torch.ones(2, 3), [])) == 2


def test_criteria_without_labels(sample):
    weights, inputs, pairs = of_weights(sample), of_inputs(sample), of_pairs(sample)
    parts, seen = sample.parts, {}
    with torch.no_grad(), watching(parts.components, lambda i, c, z, out: seen.update({i: z})):
        parts.tokens(sample.images)
    for i, c in enumerate(parts.components):
        assert weights["parameters"][i] == sum(p.numel() for p in c.parameters.values())
        if c.kind != "FC1":
            assert np.isnan(weights["spectrum"][i]) == (c.kind in ("LN1", "LN2"))
            continue
        W, z = c.module.weight.detach().numpy(), seen[i].flatten(0, 1).numpy()
        s = np.linalg.svd(W, compute_uv=False)
        q1, q3 = np.quantile(s, [0.25, 0.75])
        edge = (q3 - q1) / 1.349 * (1 + np.sqrt(min(W.shape) / max(W.shape)))
        below = s[s <= edge].sum()
        np.testing.assert_allclose(weights["spectrum"][i], s[s > edge].sum() / below / s[0] if below else np.inf)
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        random = np.random.default_rng(0).normal(size=(4000, *W.shape)) * np.linalg.norm(W) / np.sqrt(W.size)
        expected = np.sqrt((np.einsum("rmd,d->rm", random, unit[0]) ** 2).sum(1).mean())
        np.testing.assert_allclose(-inputs["low nfn"][i], np.linalg.norm(unit @ W.T, axis=1).mean() / expected, rtol=0.03)
        np.testing.assert_allclose(inputs["fps"][i], (np.abs(W) * np.abs(z).mean(0)).sum())
        variance = np.linalg.eigvalsh(np.cov(z.T, bias=True))
        np.testing.assert_allclose(inputs["eva"][i], variance[-16:].sum() / variance.sum())
    own = vp.plasticity(sample.model, sample.old, sample.images, inputs="native")
    np.testing.assert_allclose(pairs["native plasticity"], own.plasticity)
    branch = vp.plasticity(sample.model, sample.old, sample.images, of="branch")
    assert (pairs["branch share"][:5] == [*[branch.share[0]] * 2, *[branch.share[1]] * 3]).all()


def test_one_call_gives_a_tidy_frame(stripes):
    model = tiny_vit(depth=2)
    frame = vp.criteria(model, stripes, images=40)
    assert tuple(frame.criterion.unique()) == CRITERIA and len(frame) == 10 * len(CRITERIA)
    assert set(frame[frame.value.isna()].criterion) <= set(NOT_OF_NORMS)
    assert set(frame[frame.labelled].criterion) == {c for f in FAMILIES.values() if f.labelled for c in f.criteria}
    assert (frame.seconds > 0).all() and (frame.forward_passes >= 0).all()
    few = vp.criteria(model, stripes, ["gradient", "inputs"], images=40)
    assert list(few.criterion.unique()) == ["low nfn", "fps", "eva", "gradient"]
    merged = few.merge(frame, on=["block", "component", "criterion"])
    np.testing.assert_allclose(merged.value_x, merged.value_y)


def test_augmented_tasks_are_looked_at_still(stripes):
    larger = Split(torch.nn.functional.pad(stripes.train.images, (1, 1, 1, 1)), stripes.train.labels)
    crops = RandomCrops(16, torch.ones(len(larger)))
    moving = Task("moving", stripes.classes, larger, stripes.validation, stripes.test, 37, crops)
    assert len(vp.criteria(tiny_vit(), moving, "gradients", images=20)) == 10 * 10
    assert len(vp.suggest_rates(tiny_vit(), moving, ["FC1"], images=20)) == 1


def test_bad_questions_are_answered(stripes):
    model = tiny_vit()
    with pytest.raises(ValueError, match="unknown criterion 'gradiant'.*gradient"):
        vp.criteria(model, stripes, "gradiant")
    one = Split(stripes.train.images, torch.zeros_like(stripes.train.labels))
    with pytest.raises(ValueError, match="are of one class"):
        vp.criteria(model, Task("one", stripes.classes, one, stripes.validation, stripes.test, 37), images=20)
    with pytest.raises(ValueError, match="images=0"):
        vp.criteria(model, stripes, images=0)
    plain = tiny_vit(norm_layer=partial(torch.nn.LayerNorm, elementwise_affine=False, eps=1e-6))
    with pytest.raises(ValueError, match="LN1 of block 0 has no parameters"):
        vp.criteria(plain, stripes, images=20)
    with pytest.raises(TypeError, match="float16"):
        vp.criteria(tiny_vit().half(), stripes, "gradients", images=20)
