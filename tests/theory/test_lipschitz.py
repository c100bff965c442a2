"""Lower bounds: against the full Jacobian and all pairs by brute force, and never above what is exact."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import noise, tiny_vit

import vitplast as vp
from vitplast.models import anatomy, evaluating, visit
from vitplast.theory import power_iteration
from vitplast.theory.lipschitz import ball_step, hull_step, norm_step
from vitplast.theory.norms import spreads

KEYS = ["block", "component"]


def received(model, x, inputs):
    found = {}
    with evaluating(model):
        visit(anatomy(model), x, inputs, lambda i, c, a, _: found.update({(c.block, c.kind): (c, a)}), outputs=False)
    return found


@pytest.mark.parametrize("inputs", ["embedding", "native"])
def test_every_column_by_brute_force(model, inputs):
    x = noise(3)
    frame = vp.lipschitz(model, x, inputs=inputs, iterations=3000).set_index(KEYS)
    for key, (c, tokens) in received(model, x, inputs).items():
        moving = (tokens.amax((0, 1)) > tokens.amin((0, 1))) | (c.kind not in ("FC1", "FC2"))
        norms = []
        for t in tokens:
            J = torch.func.jacrev(lambda u: c(u[None])[0])(t).detach()
            norms.append(np.linalg.norm(J[..., moving].reshape(-1, t.shape[0] * int(moving.sum())).numpy(), 2))
        assert np.isclose(frame.local[key], max(norms), rtol=1e-4) and frame.local[key] <= max(norms) * (1 + 1e-12), key
        with torch.no_grad():
            out = c(tokens)
        pairs = [((out[a] - out[b]).norm() / (tokens[a] - tokens[b]).norm()).item() for a, b in itertools.combinations(range(3), 2)]
        assert np.isclose(frame.pair[key], max(pairs), rtol=1e-12)
        assert frame.lower[key] == max(frame.pair[key], frame.adversarial[key]) and frame.residual[key] < 1e-3


def test_power_iteration_stopped_early_is_still_a_lower_bound_and_says_so():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(7, 6, generator=g, dtype=torch.float64)
    start, exact = torch.randn(2, 3, 6, generator=g, dtype=torch.float64), np.linalg.norm(W.numpy(), 2)
    values, residuals = [], []
    for n in (1, 3, 10, 1000):
        value, v, residual = power_iteration(lambda t: t @ W.T, torch.zeros(2, 3, 6, dtype=torch.float64), start, 1.0, n, tolerance=1e-9)
        eigenvalues = np.linalg.eigvalsh((W.T @ W).numpy())
        nearest = np.abs(eigenvalues[None] - value.numpy()[:, None] ** 2).min(1)
        assert (nearest <= residual.numpy() * value.numpy() ** 2 + 1e-12).all()  # Theorem 22
        values.append(value.max().item()), residuals.append(residual.max().item())
    assert values == sorted(values) and values[-1] <= exact * (1 + 1e-12) and values[0] < 0.99 * exact
    assert math.isclose(values[-1], exact, rel_tol=1e-9) and residuals[0] > 0.1 and residuals[-1] < 1e-8


def test_steps_stay_in_the_domain():
    g = torch.Generator().manual_seed(0)
    x, push = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    for length in (0.01, 0.5, 1.0):
        mixed = hull_step(x)(x, push, torch.tensor(length))
        for t in mixed:  # in the hull: least squares with weights that sum to 1 leaves nothing, and all weights are positive
            A = np.vstack([x.flatten(1).T.numpy(), np.ones(3)])
            weight, *_ = np.linalg.lstsq(A, np.append(t.flatten().numpy(), 1.0), rcond=None)
            assert np.allclose(A @ weight, np.append(t.flatten().numpy(), 1.0)) and weight.min() > -1e-9
        assert ball_step(1.5)(x, 100 * push, length).norm(dim=-1).max() <= 1.5 * (1 + 1e-12)
        for w in (c.weights() for c in vp.components(tiny_vit(embed_dim=5, num_heads=1))[:1]):
            sigma = spreads(x, w).min().item()
            moved = norm_step(w, sigma)(x, push, torch.tensor(10 * length))
            assert spreads(moved, w).min() >= sigma * (1 - 1e-9)


def test_a_radius_opens_the_whole_ball(model):
    x = noise(3)
    radius = 1.2 * vp.bounds(model, x).radius.max()
    hull, ball = (vp.lipschitz(model, x, radius=r, steps=30).set_index(KEYS).xs("MHA", level="component") for r in (None, radius))
    bound = vp.bounds(model, x, radius=radius, kind="sharp").set_index(KEYS).bound.xs("MHA", level="component")
    assert (hull.local == ball.local).all() and (ball.adversarial > ball.local).all() and (ball.lower <= bound).all()


def test_the_model_is_left_alone_and_the_same_call_gives_the_same_numbers(model):
    model.train()
    model.blocks[0].norm1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (vp.lipschitz(model, noise(4), iterations=4, steps=2, batch_size=b) for b in (4, 3))
    assert first.equals(second) and model.training and not model.blocks[0].norm1.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())


def test_single_precision_is_measured_in_double():
    model = tiny_vit().float()
    frame = vp.lipschitz(model, noise(2, dtype=torch.float32), inputs="native", iterations=3000).set_index(KEYS)
    exact = np.linalg.norm(model.blocks[0].mlp.fc1.weight.detach().double().numpy(), 2)
    assert exact * (1 - 1e-5) <= frame.lower[0, "FC1"] <= exact * (1 + 1e-14)


def test_a_component_that_does_nothing_and_a_single_image(model):
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
    frame = vp.lipschitz(model, noise(1)).set_index(KEYS)
    assert frame.lower[0, "MHA"] == 0 and frame.residual[0, "MHA"] == 0 and frame.pair.isna().all() and (frame.n_images == 1).all()
    assert (frame.lower.drop((0, "MHA")) > 0).all()


@pytest.mark.parametrize("kwargs, message", [
    (dict(x=[]), "no images"), (dict(iterations=0), "iterations=0: expected a positive integer"), (dict(steps=1.5), "steps=1.5"),
    (dict(radius=-1.0), "radius=-1.0: expected a positive number"), (dict(radius=0.1), "radius=0.1: smaller than the tokens' own at MHA of block 0"),
    (dict(inputs="both"), "inputs='both'"),
])  # fmt: skip
def test_bad_input(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        vp.lipschitz(model, **({"x": noise(2)} | kwargs))
