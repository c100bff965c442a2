"""A label for each pixel, or for each token: the same loop, against brute force and scikit-learn."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import build
from conftest import tiny_vit
from sklearn.metrics import accuracy_score, jaccard_score
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from typer.testing import CliRunner

import vitplast as vp
from vitplast.cli import app
from vitplast.data import Split, Task
from vitplast.models import anatomy, prepare
from vitplast.training import finetune_many, fit_head

FAST = vp.FinetuneConfig(steps=6, eval_every=3, batch_size=8, lr=0.1)


def halves(n, seed):
    "Pictures whose right half is bright, dark or dim, and which it is at each pixel."
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
    kinds = torch.arange(n) % 3
    labels = torch.zeros(n, 16, 16, dtype=torch.long)
    labels[:, :, 8:] = kinds[:, None, None]
    images[:, :, :, 8:] += (labels[:, None, :, 8:] * 90).to(torch.uint8)
    return Split(images, labels)


@pytest.fixture
def dense():
    return Task("halves", ("ground", "dim", "bright"), halves(48, 0), halves(9, 1), halves(12, 2), test_sources=12)


@pytest.fixture
def sequences():
    "Tokens that count upwards, from anywhere."
    def split(n, seed):
        start = torch.randint(50, (n, 1), generator=torch.Generator().manual_seed(seed))
        whole = (start + torch.arange(10)) % 50
        return Split(whole[:, :9], whole[:, 1:])

    return Task("counting", tuple(map(str, range(50))), split(40, 0), split(12, 1), split(10, 2), test_sources=10)


@torch.no_grad()
def by_hand(model, images):
    "Classes of pixels: timm's tokens, the last norm, the head, the grid, the picture."
    x = prepare(model, images)
    tokens = model.norm(anatomy(model).tokens(x)) if not isinstance(model.norm, torch.nn.Identity) else anatomy(model).tokens(x)
    said = (model.fc_norm(tokens) @ model.head.weight.T + model.head.bias)[:, 1:].transpose(1, 2).view(len(x), -1, 2, 2)
    return torch.nn.functional.interpolate(said, size=(16, 16), mode="bilinear")


@pytest.mark.parametrize("what", ["MHA", "FC2@-1", "head"])
def test_pixels_are_scored_by_mean_intersection_over_union(dense, what):
    model = tiny_vit()
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = vp.finetune(model, dense, what, FAST)
    said = by_hand(run.model, dense.test.images).argmax(1)
    expected = jaccard_score(dense.test.labels.flatten(), said.flatten(), average="macro", zero_division=0)
    assert run.test_accuracy == pytest.approx(expected, rel=1e-12)
    own = [n for n, p in run.model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert bool(own) == (what != "head") and run.model.head.weight.shape == (3, 12)


def test_the_loss_of_pixels_is_a_mean_over_all(dense):
    config = replace(FAST, steps=1, eval_every=1, lr=1e-30, batch_size=48)
    run = vp.finetune(tiny_vit(), dense, "head", config)
    logits = by_hand(run.model, dense.train.images)
    one_hot = torch.nn.functional.one_hot(dense.train.labels, 3).movedim(3, 1)
    expected = -(logits.log_softmax(1) * one_hot).sum(1).mean()
    assert run.history.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    weighted = vp.finetune(tiny_vit(), dense, "head", replace(config, class_weights=True))
    counts = torch.bincount(dense.train.labels.flatten()).double()
    weights = (counts.sum() / (3 * counts)).float().double()
    expected = -(logits.log_softmax(1) * one_hot * weights[:, None, None]).sum(1).mean()
    assert weighted.history.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_run_that_labels_pixels_is_saved_and_read(dense, tmp_path):
    model = tiny_vit()
    run = vp.finetune(model, dense, "LN2", FAST)
    again = vp.load_run(run.save(tmp_path / "run"), tiny_vit())
    x = prepare(model, dense.test.images)
    with torch.no_grad():
        assert torch.equal(anatomy(again.model).logits(x), anatomy(run.model).logits(x))
    card = (tmp_path / "run/README.md").read_text()
    assert "image-segmentation" in card and "intersection over union" in card
    with pytest.raises(ValueError, match=r"says a class for each place of an input, logits \(12, 3, 16, 16\)"):
        again.predict(dense)


def test_what_pixels_cannot_have(dense):
    model = tiny_vit()
    with pytest.raises(ValueError, match="shots=2: pictures of halves have a label for each place, expected None"):
        vp.finetune(model, dense, "MHA", replace(FAST, shots=2))
    with pytest.raises(ValueError, match="a linear probe needs one label of each input; halves has"):
        vp.linear_probe(model, dense)
    with pytest.raises(ValueError, match="a fitted head needs one label of each input"):
        fit_head(model, dense)
    with pytest.raises(ValueError, match="training runs together needs one label of each input"):
        finetune_many(model, dense, "MHA", [FAST, replace(FAST, seed=1)])
    with pytest.raises(TypeError, match="a VisionTransformer has no head for pixels: expected"):
        vp.finetune(TorchvisionViT(16, 8, 2, 3, 24, 40, num_classes=4), dense, "MHA", FAST)


def test_what_needs_one_label_says_so_before_it_computes(dense, sequences, tmp_path):
    for model, task, shape in ((tiny_vit(), dense, r"halves has \(16, 16\)"), (language_model(), sequences, r"counting has \(9,\)")):
        for call in (vp.advise, vp.criteria, lambda m, t: vp.suggest_rates(m, t, ["MHA"])):
            with pytest.raises(ValueError, match="needs one label of each input; " + shape):
                call(model, task)
    done = CliRunner().invoke(app, ["finetune", "formula-vit", "shapes/mask", "--save", str(tmp_path / "run")])
    assert done.exit_code == 1 and "needs one label of each input; shapes/mask has (32, 32)" in done.output
    assert not (tmp_path / "run").exists()


def test_a_model_of_classes_has_no_label_for_a_token(sequences):
    with pytest.raises(ValueError, match="has a label for each token, the model says one class of a sequence"):
        vp.finetune(build("GPT-2 class head"), sequences, "MHA", FAST)


def language_model():
    model = build("GPT-2 language head").double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("what", ["MHA", "FC1@-1", "LN2"])
def test_a_language_model_keeps_its_head_and_is_scored_by_tokens(sequences, what):
    model = language_model()
    run = vp.finetune(model, sequences, what, FAST)
    with torch.no_grad():
        said = run.model(sequences.test.images).logits.argmax(-1)
    expected = accuracy_score(sequences.test.labels.flatten(), said.flatten())
    assert run.test_accuracy == pytest.approx(expected, rel=1e-12)
    assert torch.equal(run.model.lm_head.weight, model.lm_head.weight)
    assert run.n_trained == sum(p.numel() for c in vp.components(model) if c.kind == what[:3] and (c.block == 1 or "@" not in what) for p in c.parameters.values())


def test_kept_tokens_change_nothing_of_a_language_model(sequences):
    kept = vp.finetune(language_model(), sequences, "FC2@-1", FAST)
    whole = vp.finetune(language_model(), sequences, "FC2@-1", replace(FAST, watch=("LN1",)))
    assert np.allclose(kept.history.loss, whole.history.loss, rtol=1e-10)
    cut = replace(sequences, **{s: Split(getattr(sequences, s).images[:, :5], getattr(sequences, s).labels[:, :5]) for s in ("train", "validation", "test")})
    short = vp.finetune(language_model(), cut, "FC2@-1", FAST)
    assert short.history.loss.notna().all()


def test_what_a_language_model_does_not_read(sequences, tmp_path):
    model = language_model()
    longer = Split(torch.zeros(4, 11, dtype=torch.long), torch.zeros(4, 11, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(4, 11\), expected \(N, n\) with n from 1 to 9"):
        vp.finetune(model, replace(sequences, train=longer, validation=longer, test=longer), "MHA", FAST)
    few = replace(sequences, classes=tuple(map(str, range(60))))
    with pytest.raises(ValueError, match="60 classes of tokens, the model's vocabulary 50"):
        vp.finetune(model, few, "MHA", FAST)
    run = vp.finetune(model, sequences, "MHA", FAST)
    with pytest.raises(TypeError, match="run.save is for networks of pictures.*save_pretrained"):
        run.save(tmp_path / "run")
