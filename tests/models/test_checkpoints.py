"""Weights of one's own: files, folders and hubs, and that nothing in them is run."""
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from architectures import HF
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import vitplast as vp
from vitplast.models import anatomy, convert, model_source, prepare, skeleton
from vitplast.models.huggingface import as_pretrained_cfg
from vitplast.training import finetune_many

TINY = "vit_tiny_patch16_224"
SMALL = {k: v for k, v in HF.items() if k != "num_labels"}


@pytest.fixture(scope="module")
def net():
    "timm's smallest, with a head of seven classes."
    return timm.create_model(TINY, num_classes=7).eval()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_name_and_a_file_are_one_text(net, tmp_path, monkeypatch):
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    for name in (f"{TINY}@mine.safetensors", f"{TINY}@{tmp_path}/mine.safetensors"):
        assert same(vp.load(name), net) and str(model_source(name)) == f"{TINY}@{tmp_path}/mine.safetensors"
    assert same(vp.load(TINY, checkpoint_path="mine.safetensors"), net)  # seven classes, without being told
    headless = {k: v for k, v in net.state_dict().items() if not k.startswith("head.")}
    save_file(headless, "headless.safetensors")
    assert not anatomy(vp.load(f"{TINY}@headless.safetensors")).head()
    assert anatomy(skeleton(f"{TINY}@mine.safetensors")).image_shape == (3, 224, 224)


@pytest.mark.parametrize("name, error, message", [
    ("vit_tiny@{}/mine.safetensors", ValueError, "unknown model 'vit_tiny'; nearest known"),
    (TINY + "@{}/none.safetensors", FileNotFoundError, "none.safetensors: no such file"),
    ("vit_small_patch16_224@{}/mine.safetensors", ValueError, "mine.safetensors: 151 tensors do not fit VisionTransformer, first blocks.0.attn.proj.bias: .192., expected .384."),
    ("owner/name@{}/mine.safetensors", FileNotFoundError, "no such file"),
    ("formula-vit@{}/mine.safetensors", ValueError, "formula-vit has weights of its own, expected the name of one of timm's networks before @mine"),
    (TINY + "@{}/run.pth", ValueError, "run.pth: expected a .safetensors file; other checkpoint formats can hold code, `vitplast convert"),
    ("{}/run.pth", ValueError, "run.pth: expected a .safetensors file"),
    ("{}/empty", ValueError, "no config.json in this folder"),
    ("./nowhere", ValueError, "unknown model './nowhere'"),
    ("", ValueError, "unknown model ''"),
    ("{}/mine.safetensors", ValueError, "names no vitplast architecture"),
    ("{}/none.safetensors", FileNotFoundError, "none.safetensors: no such file"),
])  # fmt: skip
def test_files_that_are_none(net, tmp_path, name, error, message):
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    torch.save({}, tmp_path / "run.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        vp.load(name.format(tmp_path))


@pytest.mark.parametrize("wrap, held, prefix, others", [
    (lambda w: w, "", "", ()),
    (lambda w: {"epoch": 3, "model": w}, "model", "", ()),
    (lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}}, "state_dict", "module.", ()),
    (lambda w: {"state_dict": {f"model._orig_mod.{k}": v for k, v in w.items()}}, "state_dict", "model._orig_mod.", ()),
    (lambda w: {"model": {k: v + 1 for k, v in w.items()}, "model_ema": w}, "model_ema", "", ("model",)),
])  # fmt: skip
def test_conversion_unwraps_and_says_how(net, tmp_path, wrap, held, prefix, others):
    torch.save(wrap(net.state_dict()), tmp_path / "run.pth")
    done = convert(tmp_path / "run.pth")
    assert done == (tmp_path / "run.safetensors", len(net.state_dict()), held, others, prefix)
    assert same(vp.load(f"{TINY}@{done.path}"), net)


def test_what_training_scripts_save_beside_weights_is_left(net, tmp_path):
    beside = {"args": Namespace(lr=0.1, out=Path("x")), "epoch": np.float64(3), "history": np.arange(3.0)}
    torch.save(beside | {"model": {"net": net.state_dict()}}, tmp_path / "run.pth")
    done = convert(tmp_path / "run.pth")
    assert done.held == "model.net" and same(vp.load(f"{TINY}@{done.path}"), net)
    with pytest.raises(ValueError, match="is a .safetensors file already"):
        convert(done.path, overwrite=True)


def test_two_files_of_weights_are_one_too_many(net, tmp_path, monkeypatch):
    save_file(net.state_dict(), tmp_path / "a@b.safetensors")
    assert same(vp.load(f"{TINY}@{tmp_path}/a@b.safetensors"), net)
    with pytest.raises(ValueError, match="two files of weights, expected one"):
        vp.load(f"{TINY}@{tmp_path}/a@b.safetensors", checkpoint_path="other.safetensors")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content, message", [
    ({"model": Evil()}, "run.bin: holds more than weights .(posix|nt).mkdir., which could run code"),
    (torch.nn.Linear(2, 2), "run.bin: holds more than weights .torch.nn.modules.linear.Linear."),
    ([torch.ones(2)], "run.bin: holds a list, expected a dictionary of tensors"),
    ({"epoch": 3, "optimizer": {}}, r"run.bin: no weights in it; it holds .'epoch', 'optimizer'., expected tensors by name"),
    ({"a": torch.ones(2), "b": "text"}, "run.bin: entry 'b' is a str, beside 1 tensors"),
    ({1: torch.ones(2)}, "run.bin: no weights in it"),
    ({"a": torch.ones(2).to_sparse()}, "run.bin: tensor 'a' is sparse"),
    (b"hello world, this is text", "run.bin: not a checkpoint of PyTorch"),
    ({}, "run.bin: no weights in it"),
    (b"garbage", "run.bin: (not a checkpoint of PyTorch|holds more than weights)"),
    (b"", "run.bin: not a checkpoint of PyTorch"),
])  # fmt: skip
def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        convert(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.bin"]


def test_conversion_asks_before_it_replaces(tmp_path):
    torch.save({"w": torch.ones(2, 3).T}, tmp_path / "run.pth")  # not contiguous, and shared below
    file = tmp_path / "other.safetensors"
    convert(tmp_path / "run.pth", file)
    with pytest.raises(ValueError, match="other.safetensors: exists"):
        convert(tmp_path / "run.pth", file)
    shared = torch.ones(2)
    torch.save({"a": shared, "b": shared}, tmp_path / "run.pth")
    convert(tmp_path / "run.pth", file, overwrite=True)
    assert sorted(load_file(file)) == ["a", "b"]
    with pytest.raises(ValueError, match="x.bin: expected a name that ends in .safetensors"):
        convert(tmp_path / "run.pth", "x.bin")
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        convert(tmp_path / "none.pth")


PROCESSOR = dict(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
SAVED = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**HF)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**HF)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**{k: v for k, v in SMALL.items() if k != "intermediate_size"})),  # without a head
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=SMALL, text_config=dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8))),
}  # fmt: skip


@pytest.fixture(params=SAVED)
def saved(request, tmp_path):
    "A folder that transformers saved, and the model in it."
    model = SAVED[request.param]().eval()
    model.save_pretrained(tmp_path / "mine")
    ViTImageProcessor(**PROCESSOR).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine", model


def body(state) -> dict:
    "The tensors of a vision tower, by the ends of their names."
    return {k.split("layer", 1)[1]: v for k, v in state.items() if "layer" in k and "text_model" not in k}


def test_a_folder_of_transformers_is_a_model_with_a_head_and_its_own_images(saved):
    folder, model = saved
    found = vp.load(folder)
    assert type(found).__name__.endswith("ForImageClassification") and not found.training
    mine, theirs = body(found.state_dict()), body(model.state_dict())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert same(vp.load(folder), found)  # a head that is drawn is the same again
    assert anatomy(vp.load(folder, num_classes=3)).logits(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    assert not same(vp.load(folder, pretrained=False), found)
    picture = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    processor = ViTImageProcessor(**PROCESSOR, do_resize=False)
    expected = processor(picture[0], return_tensors="pt")["pixel_values"]
    assert torch.allclose(prepare(found, picture), expected, atol=1e-6)
    for selection in ("MHA@-1", "all"):  # some of their parameters are in no output: mask tokens, a norm
        config, task = vp.FinetuneConfig(steps=3, eval_every=3), vp.task("digits", size=16)
        alone, (stacked,) = vp.finetune(found, task, selection, config), finetune_many(found, task, selection, [config])
        assert stacked.test_accuracy == pytest.approx(alone.test_accuracy, abs=0.01)
        assert stacked.history.loss.tolist() == pytest.approx(alone.history.loss.tolist(), rel=1e-4)
        assert stacked.history.grad_norm.tolist() == pytest.approx(alone.history.grad_norm.tolist(), rel=1e-3)


def test_a_norm_that_nothing_reads_is_not_trained():
    model = CLIPForImageClassification(CLIPConfig(vision_config=SMALL, num_labels=3))
    with pytest.raises(ValueError, match="final_norm=True: no output of this model reads a norm after its blocks"):
        vp.trainable(model, "MHA", final_norm=True)


def test_a_repository_is_found_in_the_cache_without_a_network(saved, tmp_path, monkeypatch):
    folder, _ = saved
    from huggingface_hub import constants

    snapshot = tmp_path / "hub/models--me--mine/snapshots/abc"
    shutil.copytree(folder, snapshot)
    (tmp_path / "hub/models--me--mine/refs").mkdir()
    (tmp_path / "hub/models--me--mine/refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(vp.load("me/mine"), vp.load(folder)) and same(vp.load("hf-hub:me/mine"), vp.load(folder))
    with pytest.raises(FileNotFoundError, match="weights of 'me/other' are not in the cache and could not be fetched"):
        vp.load("me/other")


def test_a_folder_of_timm_is_a_model(net, tmp_path):
    timm.models.save_for_hf(net, tmp_path / "mine", safe_serialization=True)
    assert same(vp.load(tmp_path / "mine"), net)


def test_folders_that_are_not_what_they_say(saved, tmp_path):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    one = next(k for k in tensors if "layer" in k and k.endswith("weight") and "text" not in k)
    save_file({k: v for k, v in tensors.items() if k != one}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mine: 1 tensors are missing or of another shape, first .*weight"):
        vp.load(folder)
    if "text_model" not in str(tensors):
        config = json.loads((folder / "config.json").read_text())
        shallow = config["vision_config"] if "vision_config" in config else config
        shallow["num_hidden_layers"] = 1
        [shallow.pop(k, None) for k in ("out_features", "out_indices", "stage_names")]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="tensors belong to no block of its config.json, first .*1"):
            vp.load(folder)
    (folder / "model.safetensors").write_bytes(b"broken" * 9)
    with pytest.raises(ValueError, match="mine: cannot be loaded"):
        vp.load(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="mine: .*no file named model.safetensors"):
        vp.load(folder)
    for text, message in (("{", "config.json: not JSON"), ("[]", "config.json: expected an object with model_type"), ("{}", "config.json: expected an object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            vp.load(folder)


@pytest.mark.parametrize("text, message", [("{", "its image processor is not JSON"), ('{"size": 16}', "does not say mean, std and size as expected"), ('{"image_mean": null, "image_std": 1}', "does not say mean, std")])
def test_image_processors_that_say_nothing(tmp_path, text, message):
    SAVED["vit"]().save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        vp.load(tmp_path / "mine")


def test_other_architectures_are_taken_as_they_are(tmp_path):
    GPT2Model(GPT2Config(n_embd=12, n_layer=1, n_head=3, n_positions=8, vocab_size=20)).save_pretrained(tmp_path / "gpt")
    assert len(vp.components(vp.load(tmp_path / "gpt"))) == 5
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/config.json").write_text(json.dumps({"model_type": "no-such"}))
    with pytest.raises(ValueError, match="no-such"):
        vp.load(tmp_path / "strange")


@pytest.mark.parametrize("processor, expected", [
    ({"size": 224}, {"input_size": (3, 224, 224), "crop_pct": 1.0}),
    ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, {"input_size": (3, 224, 224), "crop_pct": 0.875}),
    ({"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, {"input_size": (3, 224, 224), "crop_pct": 0.875}),
    ({}, {}),
])  # fmt: skip
def test_image_processors_in_timms_words(processor, expected):
    given = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    assert as_pretrained_cfg(given | processor) == expected | {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    assert as_pretrained_cfg({"do_normalize": False} | processor)["std"] == (1.0,) * 3
    with pytest.raises(ValueError, match="rescale_factor 1, expected 1/255|rescale_factor 1., expected"):
        as_pretrained_cfg(given | {"rescale_factor": 1})


def test_another_size_where_positions_stretch_and_only_there(saved, tmp_path):
    folder, model = saved
    size = vp.models.anatomy(vp.load(folder)).image_shape[-1]
    assert vp.models.anatomy(vp.load(folder, img_size=size)).image_shape[-1] == size
    patch = vp.load(folder).config.to_dict().get("patch_size", 8)
    if "dinov2" in type(model).__name__.lower():
        found = vp.load(folder, img_size=size + patch)
        assert vp.models.anatomy(found).image_shape == (3, size + patch, size + patch)
        x = torch.randn(2, 3, size + patch, size + patch)
        with torch.no_grad():
            own = vp.load(folder)(x)
            assert torch.equal(vp.models.anatomy(found).logits(x), own.logits)
    else:
        with pytest.raises(ValueError, match=f"img_size={size + patch}, expected {size}, the size of its images"):
            vp.load(folder, img_size=size + patch)
    with pytest.raises(ValueError, match=f"img_size={size + 1}, expected {size}"):
        vp.load(folder, img_size=size + 1)


def test_a_network_of_texts_has_no_size_of_images(tmp_path):
    GPT2Model(GPT2Config(n_embd=12, n_layer=1, n_head=3, n_positions=8, vocab_size=20)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError, match="img_size=16, but it takes no images"):
        vp.load(tmp_path / "gpt", img_size=16)
