"""Loading: what is shipped, what is refused, and nothing half-loaded."""
import json
import re
import struct

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import vitplast as vp
from vitplast.models import HEADER, SHIPPED, ViTConfig, build, card, prepare, save
from vitplast.models.loading import load_local, positions

SMALL = ViTConfig(size=16, patch=8, width=16, depth=1, heads=2)


@pytest.fixture
def file(tmp_path):
    save(build(SMALL, seed=3), SMALL, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_the_shipped_model_is_small_and_says_how_it_was_made():
    model, info = vp.load("formula-vit"), card("formula-vit")
    assert not model.training and (SHIPPED / "formula-vit.safetensors").stat().st_size <= 8e6
    assert {"pretraining", "steps", "seconds", "hardware", "linear_probe"} <= set(info)
    assert info["pretraining"]["seed"] == 0 and "formula" in info["pretraining"]
    probe = vp.linear_probe(model, vp.task("digits"))
    assert abs(probe - info["linear_probe"]["pretrained"]) < 0.01  # a few images may flip with another torch
    assert probe > info["linear_probe"]["untrained"] + 0.3


def test_a_file_gives_back_the_same_function(file):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(vp.load(file)(x), build(SMALL, seed=3)(x))


def test_truncated_files_are_refused_by_name(file):
    whole = file.read_bytes()
    for n in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"small.safetensors: not a complete safetensors file"):
            vp.load(file)
    file.write_bytes(b"\x80\x04" + whole)  # a pickle, say
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        vp.load(file)


def test_foreign_files_are_refused_by_name(file):
    tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="names no vitplast architecture.*checkpoint_path"):
        vp.load(file)
    save_file(tensors, file, metadata={HEADER: json.dumps({"width": 16})})
    with pytest.raises(ValueError, match="expected the architecture"):
        vp.load(file)


def test_tensors_that_do_not_fit_are_named(file):
    tensors = load_file(file)
    header = json.dumps(vars(SMALL))
    for change, message in (
        (lambda t: t | {"norm.weight": torch.ones(3)}, r"1 tensors do not fit its architecture, first norm.weight: \(3,\), expected \(16,\)"),
        (lambda t: {k: v for k, v in t.items() if k != "norm.bias"}, r"first norm.bias: None, expected \(16,\)"),
        (lambda t: t | {"extra": torch.ones(1)}, r"first extra: \(1,\), expected None"),
    ):
        save_file(change(tensors), file, metadata={HEADER: header})
        with pytest.raises(ValueError, match=message):
            load_local(file)


def test_a_header_with_an_impossible_length(file):
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        vp.load(file)


@pytest.mark.parametrize("name, near", [("vit_base_patch16_224.augreg_in22k", "vit_base_patch16_224.augreg_in21k"), ("formula_vit", "formula-vit"), ("vit_base_patch16_24", "vit_base_patch16_224"), ("zzz", "formula-vit")])
def test_unknown_names_get_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown model {re.escape(repr(name))}; nearest known: .*{re.escape(near)}"):
        vp.load(name)


def test_missing_files_and_stray_arguments():
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file"):
        vp.load("nowhere.safetensors")
    with pytest.raises(TypeError, match="formula-vit: takes no further arguments, got .'pretrained'"):
        vp.load("formula-vit", pretrained=False)
    with pytest.raises(ValueError, match="no card for 'formula'"):
        card("formula")


def test_timm_models_by_name_and_from_a_local_checkpoint(tmp_path):
    model = vp.load("vit_tiny_patch16_224", pretrained=False)
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer) and not model.training
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    again = vp.load("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "tiny.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_checkpoints_that_are_damaged_missing_or_pickles(tmp_path):
    file = tmp_path / "weights.safetensors"
    for content, error, message in (
        (None, FileNotFoundError, "weights.safetensors: no such file"), (b"garbage" * 9, ValueError, "weights.safetensors: no weights for vit_tiny"),
    ):  # fmt: skip
        if content:
            file.write_bytes(content)
        with pytest.raises(error, match=message):
            vp.load("vit_tiny_patch16_224", checkpoint_path=str(file))
    save_file({"other": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"weights.safetensors: 151 tensors do not fit VisionTransformer, first blocks.0.attn.proj.bias: None, expected .192."):
        vp.load("vit_tiny_patch16_224", checkpoint_path=file)
    pickle = tmp_path / "weights.pth"
    torch.save({}, pickle)
    with pytest.raises(ValueError, match="weights.pth: expected a .safetensors file; other checkpoint formats can hold code"):
        vp.load("vit_tiny_patch16_224", checkpoint_path=str(pickle))
    with pytest.raises(ValueError, match="weights.pth: expected a .safetensors file; other checkpoint formats can hold code"):
        vp.load(pickle)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"weights of .vit_tiny_patch16_224. are not in the cache and could not be fetched .OSError.: .*pretrained=False"):
        vp.load("vit_tiny_patch16_224")


def test_images_are_normalised_as_the_checkpoint_was_trained():
    images = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_clip_224"):  # 0.5 / 0.5, and CLIP's own
        model = timm.create_model(name, pretrained=False)
        from torchvision.transforms.functional import normalize

        expected = normalize(images.float() / 255, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        assert torch.allclose(prepare(model, images), expected, atol=1e-6)
    with pytest.raises(TypeError, match="torch.float32: expected torch.uint8"):
        prepare(model, images.float())
    with pytest.raises(ValueError, match=r"shape \(2, 1, 224, 224\): expected \(N, 3, H, W\)"):
        prepare(model, images[:, :1])


def test_positions_are_distinct_and_of_the_right_shape():
    p = positions(ViTConfig(size=32, patch=4, width=64, heads=2))
    assert p.shape == (64, 64) and torch.pdist(p).min() > 0.1
    assert torch.allclose(p[0], torch.tensor([0.0, 1.0]).repeat_interleave(16).repeat(2))  # the first patch: sin 0, cos 0


@pytest.mark.parametrize("kwargs, message", [(dict(patch=5), "size=32 and patch=5"), (dict(heads=5), "width=96 and heads=5"), (dict(width=6, heads=3), "width=6: expected a multiple of 4")])
def test_bad_architectures(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**kwargs)
