"""Landscapes against direct evaluation: one network at a time, one input at a time, and sklearn's principal components."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from vitplast.data import Split, Task
from vitplast.models import (
    INPUTS, KINDS, ViTConfig, anatomy, build, forward_mode, prepare, visit,
)
from vitplast.theory import power_iteration
from vitplast.training import FinetuneConfig, loss_surface, rate_surface, trainable
from vitplast.training.finetune import evaluate
from vitplast.training.landscape import best_plane, pieces_of, trajectory

CONFIG = FinetuneConfig(lr=0.1, steps=6, batch_size=8, seed=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build(ViTConfig(size=16, width=24, depth=3, heads=2), seed=1)
    made.reset_classifier(4)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


@pytest.fixture(scope="module")
def task():
    g = torch.Generator().manual_seed(0)
    split = Split(torch.randint(0, 256, (40, 3, 16, 16), generator=g, dtype=torch.uint8), torch.arange(40) % 4)
    return Task("noise", tuple("abcd"), split, split, split, 40)


@pytest.mark.parametrize("kind, block", [("MHA", None), ("LN1", 2), ("FC2", 0)])
def test_a_loss_surface_is_the_loss_of_each_network(model, task, kind, block):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = loss_surface(model, task, kind, block, CONFIG, size=4, n_images=20)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and len(found.frame) == 16
    twin = copy.deepcopy(model)
    training = trainable(twin, pieces_of(twin, kind, block), head=False)
    path = trajectory(twin, task, training, CONFIG)
    mean, directions, coordinates, _ = best_plane(path)
    assert np.allclose(found.path[["a", "b"]], coordinates) and list(found.path.step) == list(range(7))
    some = Split(task.train.images[::2], task.train.labels[::2])
    for point in found.frame.iloc[::5].itertuples():
        vector_to_parameters(mean + point.a * directions[0] + point.b * directions[1], training.chosen.values())
        assert (point.loss, point.accuracy) == pytest.approx(evaluate(twin, some), rel=1e-5)
    vector_to_parameters(path[-1], training.chosen.values())
    assert found.path.loss.iloc[-1] == pytest.approx(evaluate(twin, some)[0], rel=1e-5)
    for name in ("a", "b"):  # the path lies within the grid
        assert found.frame[name].min() < found.path[name].min() and found.path[name].max() < found.frame[name].max()


def test_a_trajectory_is_plain_sgd_of_the_component_alone(model, task):
    plain = copy.deepcopy(model)
    config = FinetuneConfig(lr=0.1, steps=3, batch_size=40, warmup=0.0, momentum=0.0, clip=1e9, seed=3)
    training = trainable(twin := copy.deepcopy(model), pieces_of(twin, "FC1", 1), head=False)
    path = trajectory(twin, task, training, config)
    own = [plain.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.bias]
    rates = [0.1, 0.1, 0.05]  # the cosine starts at one
    for step, rate in enumerate(rates):
        assert torch.allclose(path[step], parameters_to_vector(own), atol=1e-6)
        gradients = torch.autograd.grad(F.cross_entropy(plain(prepare(plain, task.train.images)), task.train.labels), own)
        with torch.no_grad():
            for p, g in zip(own, gradients):
                p -= rate * g
    assert torch.allclose(path[3], parameters_to_vector(own), atol=1e-6) and not torch.equal(path[0], path[3])


def test_the_plane_is_that_of_the_principal_components():
    points = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = PCA(2).fit(points.numpy())
    mean, directions, coordinates, shares = best_plane(points)
    assert np.allclose(mean, theirs.mean_) and np.allclose(shares, theirs.explained_variance_ratio_)
    assert np.allclose(coordinates.abs().numpy(), np.abs(theirs.transform(points.numpy())))
    assert torch.allclose(directions @ directions.T, torch.eye(2, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_surface_is_the_rate_of_each_input(model, kind, inputs):
    x, y = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = rate_surface(model, x, y, kind, 1, inputs, size=4)
    double, received = copy.deepcopy(model).double(), {}
    (component,) = pieces_of(double, kind, 1)
    with torch.no_grad():
        visit(anatomy(double), torch.stack([x, y]).double(), inputs, lambda i, c, entering, _: received.update({c.name: entering}))
        x0, y0 = received[component.name].split(1)
        f = lambda tokens: component(tokens)  # noqa: E731
        assert found.new["rate"] == pytest.approx(((f(y0) - f(x0)).norm() / (y0 - x0).norm()).item(), rel=1e-4)
        assert np.hypot(found.new["a"], found.new["b"]) == pytest.approx((y0 - x0).norm().item(), rel=1e-4)
    jacobian = torch.autograd.functional.jacobian(f, x0).reshape(f(x0).numel(), x0.numel())
    both = torch.cat([x0, y0])
    varies = (both.amax((0, 1)) > both.amin((0, 1))).double().repeat(x0.shape[1])  # padding is held
    u, s, v = torch.linalg.svd(jacobian * varies, full_matrices=False)
    assert found.steepest == pytest.approx(s[0].item(), rel=2e-3) and found.steepest <= s[0] * (1 + 1e-4)
    assert len(found.frame) == 16 and (np.hypot(found.frame.a, found.frame.b) > 0).all()
    if kind.startswith("FC"):
        assert found.frame.rate.max() <= s[0] * (1 + 1e-4) and found.frame.rate.nunique() > 2


def test_every_point_of_a_rate_surface_evaluated_alone(model):
    x, y = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = rate_surface(model, x, y, "MHA", 2, size=4, reach=0.5, seed=5)
    double, received = copy.deepcopy(model).double(), {}
    double.blocks[2].attn.register_forward_hook(lambda m, args, out: received.update(x=args[0]))
    with torch.no_grad(), forward_mode():
        double(torch.stack([x, y]).double())
        x0, y0 = received["x"].split(1)
        start = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        u = power_iteration(double.blocks[2].attn, x0, start, 1.0, 200)[1]
        v = (y0 - x0) - ((y0 - x0) * u).sum() * u
        v = v / v.norm()
        assert found.frame.a.max() == pytest.approx(0.5 * (y0 - x0).norm().item(), rel=1e-4)
        for point in found.frame.itertuples():
            moved = double.blocks[2].attn(x0 + point.a * u + point.b * v) - double.blocks[2].attn(x0)
            assert moved.norm().item() / np.hypot(point.a, point.b) == pytest.approx(point.rate, rel=1e-3)


@pytest.mark.parametrize("change, message", [
    ({"kind": "MHB"}, "unknown component 'MHB'; nearest known: .'MHA'"),
    ({"block": 3}, "block=3: expected None .all. or 0 to 2"),
    ({"size": 1}, "size=1: expected an integer of at least 2"),
    ({"n_images": 0}, "n_images=0: expected an integer of at least 1"),
])
def test_what_a_loss_surface_refuses(model, task, change, message):
    with pytest.raises(ValueError, match=message):
        loss_surface(model, task, **{"kind": "MHA", "config": CONFIG} | change)


def test_a_head_of_other_classes_is_refused(model, task):
    other = Task("five", tuple("abcde"), task.train, task.validation, task.test, 40)
    with pytest.raises(ValueError, match="the head has 4 classes: expected 5, trained on five before"):
        loss_surface(model, other, "MHA", config=CONFIG)


@pytest.mark.parametrize("change, message", [
    ({"size": 5}, "size=5: expected an even number"), ({"block": None}, "block=None: expected one block"),
    ({"inputs": "nativ"}, "unknown inputs 'nativ'; nearest known: .'native'"), ({"y": None}, "one and the same at MHA of block 0"),
])
def test_what_a_rate_surface_refuses(model, change, message):
    x, y = torch.randn(2, 3, 16, 16)
    asked = {"x": x, "y": y, "kind": "MHA", "block": 0} | change
    asked["y"] = x if asked["y"] is None else asked["y"]
    with pytest.raises(ValueError, match=message):
        rate_surface(model, **asked)


def test_the_padding_of_an_embedding_input_is_held(model):
    x, y = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = rate_surface(model, x, y, "FC2", 0, "embedding", size=2, iterations=2000)
    weight = model.blocks[0].mlp.fc2.weight.detach().double()
    reached = torch.linalg.matrix_norm(weight[:, :24], 2).item()  # of 96 columns, those that an image can reach
    assert found.steepest == pytest.approx(reached, rel=1e-3) and reached < 0.99 * torch.linalg.matrix_norm(weight, 2).item()


def test_a_diverging_trajectory_is_named(model, task):
    with pytest.raises(ValueError, match="lr=1e[+]30: the trajectory diverged, expected a smaller rate"):
        loss_surface(model, task, "FC1", config=FinetuneConfig(lr=1e30, steps=6, batch_size=8), size=2, n_images=4)
    x, y = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="iterations=0: expected a positive integer"):
        rate_surface(model, x, y, "FC1", iterations=0)
