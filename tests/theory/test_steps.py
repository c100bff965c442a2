"""One step: rates and gains against Jacobians by brute force in float64, against losses after real steps, and under maps."""
import numpy as np
import pytest
import torch
from architectures import HEADED, build, inputs_of
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from vitplast.models import anatomy, chosen_places, rescale
from vitplast.theory import first_step

SELECTIONS = ["LN1", "MHA@1", "MHA.v+FC1.bias@0", "FC2", "MHA.v", "all", "head"]


def flat(places, tensors):
    "Tensors of a selection, one row after another, zero outside of its masks."
    return torch.cat([(tensors[n] if m is None else tensors[n] * m).flatten() for n, m in places.items()])


def own_of(model, selection):
    head = anatomy(model).head()
    places = chosen_places(selection, model, head=False)
    return {n: m for n, m in places.items() if n not in head} or places


def by_hand(model, x, labels, selection):
    "A function: direction (p,) of a selection -> d'Gd on pictures x, and its gradient there (p,)."
    places, parameters = own_of(model, selection), {n: p.detach() for n, p in model.named_parameters()}

    def logits(values, images):
        return functional_call(model, parameters | values, (images,))

    moving = {n: parameters[n] for n in places}

    def jacobian(images):
        found = jacrev(logits)(moving, images)
        return torch.cat([(j if places[n] is None else j * places[n]).flatten(2) for n, j in found.items()], 2)

    def bend(d, images):
        p = logits(moving, images).softmax(1)
        S = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        u = jacobian(images) @ d
        return torch.einsum("nc,nce,ne->n", u, S, u).mean().item()

    def gradient(images, y):
        leaves = {n: p.clone().requires_grad_() for n, p in moving.items()}
        found = torch.autograd.grad(cross_entropy(logits(leaves, images), y), leaves.values())
        return flat(places, dict(zip(leaves, found)))

    return bend, gradient


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rates_and_gains_are_those_of_the_jacobian(selection):
    model, x, y = tiny_vit(3, num_classes=4), noise(9, 1), torch.arange(9) % 4
    found = first_step(model, x, y, SELECTIONS, batch_size=3)
    i = SELECTIONS.index(selection)
    bend, gradient = by_hand(model, x, y, selection)
    g, batches = gradient(x, y), list(zip(x.split(3), y.split(3)))
    row = found.frame().iloc[i]
    assert np.isclose(row.gradient, g.norm().item()) and np.isclose(row.gradient_l1, g.abs().sum().item())
    assert np.isclose(row.rate, g.dot(g).item() / bend(g, x)) and np.isclose(row.gain, g.dot(g).item() ** 2 / 2 / bend(g, x))
    sign, l1 = g.sign(), g.abs().sum().item()
    assert np.isclose(row.sign_rate, l1 / bend(sign, x), rtol=1e-6) and np.isclose(row.sign_gain, l1**2 / 2 / bend(sign, x), rtol=1e-6)
    own = [gradient(*b) for b in batches]
    # each mini-batch's gradient, in the pictures of the next one
    turns = [(own[k], batches[(k + 1) % 3][0]) for k in (2, 0, 1)]
    along, bends = np.array([g.dot(d).item() for d, _ in turns]), np.array([bend(*t) for t in turns])
    assert np.isclose(row.batch_rate, along.mean() / bends.mean()) and np.isclose(row.batch_gain, along.mean() ** 2 / 2 / bends.mean())
    signs = np.array([bend(d.sign(), images) for d, images in turns])
    assert np.isclose(row.batch_sign_rate, sum(g.dot(d.sign()).item() for d, _ in turns) / signs.sum(), rtol=1e-6)
    head = [by_hand(model, x, y, "head")[1](*batches[k]).norm().item() for k in (2, 0, 1)]
    lengths = np.array([d.norm().item() for d, _ in turns])
    for joint, norms in ((False, lengths), (True, np.hypot(lengths, head))):
        s = np.minimum(1, 0.05 / norms)
        expected = 0.2 * (s * along).sum() / (s**2 * bends).sum()
        assert np.isclose(found.rates(momentum=0.8, clip=0.05, joint=joint)[i], expected)
    assert np.isclose(found.rates(momentum=0.0)[i], row.batch_rate) and np.isclose(found.rates("adamw")[i], row.batch_sign_rate)


def test_small_steps_gain_what_is_said():
    model, x, y = tiny_vit(0, num_classes=4), noise(12, 2), torch.arange(12) % 4
    frame = first_step(model, x, y, batch_size=12).frame()
    assert len(frame) == 10 and frame.batch_rate.isna().all()
    before = cross_entropy(model(x), y).item()
    for row in frame.itertuples():
        places = own_of(model, row.selection)
        parameters = dict(model.named_parameters())
        g = dict(zip(places, torch.autograd.grad(cross_entropy(model(x), y), [parameters[n] for n in places])))
        moved = {n: parameters[n] - 1e-3 * row.rate * g[n] for n in places}
        gained = before - cross_entropy(functional_call(model, moved, (x,)), y).item()
        assert np.isclose(gained, row.gain * (2e-3 - 1e-6), rtol=0.02), row


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), c=st.sampled_from([0.25, 2.0, 8.0]))
def test_uniform_scalings_move_rates_and_no_gain(seed, c):
    model, x, y = tiny_vit(seed, num_classes=4), noise(6, seed), torch.arange(6) % 4
    twin = rescale(model, LN1=c, LN2=1 / c)
    one, other = (first_step(m, x, y, ["LN1", "LN2", "FC2"], batch_size=3).frame() for m in (model, twin))
    for name, power in (("rate", 2), ("batch_rate", 2), ("sign_rate", 1), ("batch_sign_rate", 1)):
        ratio = (other[name] / one[name]).to_numpy()
        assert np.allclose(ratio, [c**power, c**-power, 1], rtol=1e-6), name
    for name in ("gain", "sign_gain", "batch_gain", "batch_sign_gain"):
        assert np.allclose(other[name], one[name], rtol=1e-6), name


def test_random_combinations_of_many_classes_are_right_on_average():
    model, x, y = tiny_vit(1, num_classes=7), noise(4, 3), torch.arange(4)
    exact = first_step(model, x, y, ["FC1", "MHA"], batch_size=4)
    tries = np.array([first_step(model, x, y, ["FC1", "MHA"], batch_size=4, probes=6, seed=s).curvature for s in range(200)])
    error = tries.std(0, ddof=1) / 200**0.5
    assert (error > 0).all() and (abs(tries.mean(0) - exact.curvature) < 4 * error).all()
    assert np.allclose(exact.curvature, first_step(model, x, y, ["FC1", "MHA"], batch_size=4, probes=7).curvature)


@pytest.mark.parametrize("name", HEADED)
def test_every_architecture(name):
    "Of each component: what its gradient moves at the logits, by central differences."
    model = build(name)
    parts = anatomy(model)
    parts.reset_head(3)
    model.double()
    with torch.no_grad():
        for k, p in enumerate(parts.head().values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=p.dtype))
    x, y = inputs_of(name, 4), torch.tensor([0, 1, 2, 0])
    frame = first_step(model, x, y, batch_size=4).frame()
    assert len(frame) == len(parts.components) and (frame.gain > 0).all()
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    for row, c in zip(frame.itertuples(), parts.components):
        model.requires_grad_(True)
        g = torch.autograd.grad(cross_entropy(parts.logits(x), y), list(c.parameters.values()), allow_unused=True)
        step, sides = 1e-5 / row.gradient, []
        with torch.no_grad():
            for sign in (1, -1):
                for (n, p), d in zip(c.parameters.items(), g):
                    p.copy_(parameters[n] + (0 if d is None else sign * step * d))
                sides.append(parts.logits(x))
            for n, p in c.parameters.items():
                p.copy_(parameters[n])
            u, p = (sides[0] - sides[1]) / (2 * step), parts.logits(x).softmax(1)
        bend = ((p * u**2).sum(1) - (p * u).sum(1) ** 2).mean().item()
        assert np.isclose(row.rate, row.gradient**2 / bend, rtol=1e-4), row


def test_nothing_is_changed_and_what_does_not_fit_is_said():
    model, x, y = tiny_vit(0, num_classes=4).train(), noise(4), torch.arange(4)
    model.blocks[0].norm1.weight.requires_grad_(False)
    first_step(model, x, y)
    assert model.training and not model.blocks[0].norm1.weight.requires_grad and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no head.*reset_head"):
        first_step(tiny_vit(), x, y)
    with pytest.raises(ValueError, match="labels: 0 to 9, expected 0 to 3"):
        first_step(model, x, torch.tensor([0, 1, 2, 9]))
    with pytest.raises(ValueError, match="MHB"):
        first_step(model, x, y, ["MHB"])
    for key in ("batch_size", "probes"):
        with pytest.raises(ValueError, match=f"{key}=0: expected a positive integer"):
            first_step(model, x, y, **{key: 0})
    with pytest.raises(ValueError, match="optimizer 'adam'.*adamw"):
        first_step(model, x, y).rates("adam")
