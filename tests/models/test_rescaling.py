"""Maps that keep a function: the same outputs on every architecture, by float64, or a refusal that names the reason."""
import pytest
import torch
from architectures import BUILD, build, inputs_of
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

import vitplast as vp
from vitplast.models import MOVES, SCALINGS, anatomy, components, normal_form, rescale, twin_name, with_file

EVERY = (*SCALINGS, *MOVES)


def logits(model, x):
    "Of a model; without a head, the tokens behind its last norm, by hand."
    parts = anatomy(model)
    with torch.no_grad():
        if parts.head():
            return parts.logits(x)
        gamma, beta = parts.final_norm.values()
        eps = next(m.eps for n, m in model.named_modules() if f"{n}.bias" in parts.final_norm)
        tokens = parts.tokens(x)
        tokens = tokens - tokens.mean(-1, keepdim=True)
        return gamma * tokens / (tokens.square().mean(-1, keepdim=True) + eps).sqrt() + beta


def changed(model, twin):
    return [n for (n, p), q in zip(model.named_parameters(), twin.parameters()) if not torch.equal(p, q)]


@pytest.fixture(scope="module")
def tried():
    "What each map does with each architecture: a twin, or what was said."
    found = {}
    for name in BUILD:
        model = build(name)
        for key in EVERY:
            try:
                found[name, key] = rescale(model, **{key: 2.0})
            except (TypeError, ValueError) as error:
                found[name, key] = error
    return found


@pytest.mark.parametrize("name", BUILD)
def test_twins_say_the_same(tried, name):
    model, x = build(name), inputs_of(name, 3)
    same = logits(model, x)
    held = {key: twin for (n, key), twin in tried.items() if n == name and not isinstance(twin, Exception)}
    for key, twin in held.items():
        assert torch.allclose(logits(twin, x), same, rtol=1e-7, atol=1e-7 * same.abs().max()), key
        if key != "fold":
            assert changed(model, twin), key
    assert set(held) >= {"LN1", "LN2", "QK", "VO", "mix"}


def test_who_refuses_what(tried):
    held = {key: {name for name in BUILD if not isinstance(tried[name, key], Exception)} for key in EVERY}
    assert held["hidden"] == set()  # none of them has ReLU
    scaled = {name for name in BUILD if any(".ls" in n or "gamma_1" in n or "layer_scale" in n for n, _ in build(name).named_parameters())}
    assert held["MHA"] == held["FC2"] == scaled and len(scaled) >= 6
    assert held["mix"] == held["fold"] == set(BUILD)
    assert held["permute"] == set(BUILD) - {"Eva mixed"}  # where every head turns by its own angles
    # one head is the embedding, one reads the stream without a norm
    assert held["stream"] == held["write"] == set(BUILD) - {"GPT-2 language head", "CLIP head"}
    assert {"timm", "torchvision", "transformers ViT", "CLIP", "GPT-2", "DINOv2"} <= held["shift"] == held["read"]
    assert {"DINOv3", "DINOv3 qkvb", "DeiT head"}.isdisjoint(held["shift"])
    assert {"timm", "torchvision"} <= held["rotate"] and {"transformers ViT", "CLIP", "DINOv2 head"}.isdisjoint(held["rotate"])
    for (name, key), error in tried.items():
        if isinstance(error, Exception):
            assert type(build(name)).__name__ in str(error), (name, key)


def relu(**kwargs):
    return tiny_vit(act_layer=nn.ReLU, **kwargs)


def test_hidden_units_scale_with_relu_only():
    model = relu()
    twin = rescale(model, hidden=4)
    assert torch.equal(twin.blocks[0].mlp.fc1.weight, 4 * model.blocks[0].mlp.fc1.weight)
    assert torch.equal(logits(model, noise(3)), logits(twin, noise(3)))
    with pytest.raises(ValueError, match="hidden: the outputs of this VisionTransformer would change"):
        rescale(tiny_vit(), hidden=1.000001)  # so near that the outputs hardly move


def test_means_are_seen_by_rms_norms():
    model = tiny_vit(norm_layer="rmsnorm", num_classes=4)
    assert torch.allclose(logits(rescale(model, LN1=3, stream=2), noise(2)), logits(model, noise(2)))
    for key in ("write", "read", "rotate"):
        with pytest.raises(TypeError, match=f"no such map of this VisionTransformer: {key} needs LayerNorm"):
            rescale(model, **{key: 1})


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from([k for k in EVERY if k != "hidden"]), st.floats(0.05, 20), min_size=1, max_size=6), st.integers(0, 99))
def test_any_sequence_of_maps(changes, seed):
    model = tiny_vit(embed_dim=24, num_classes=4, init_values=0.3)
    twin = rescale(model, seed, **changes)
    assert (logits(twin, noise(3)) - logits(model, noise(3))).abs().max() < 1e-7 * logits(model, noise(3)).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_are_exact(dtype):
    model = tiny_vit(embed_dim=24, init_values=0.5, num_classes=4).to(dtype)
    x = noise(4).to(dtype)
    twin = rescale(model, LN1=8, LN2=0.25, QK=4, VO=0.5, MHA=2, FC2=16, stream=4)
    assert torch.equal(logits(twin, x), logits(model, x)) and len(changed(model, twin)) > 20


def test_one_factor_per_block():
    model = tiny_vit()
    twin = rescale(model, LN1=[2.0, 1.0])
    assert changed(model, twin) and not [n for n in changed(model, twin) if "blocks.1" in n]
    with pytest.raises(ValueError, match="LN1: 3 factors, expected 1 or 2"):
        rescale(model, LN1=[1, 2, 3])
    with pytest.raises(ValueError, match="one factor for all blocks"):
        rescale(model, stream=[1, 2])


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), True, "8"])
@pytest.mark.parametrize("key", ["LN1", "write"])
def test_what_is_no_factor(key, bad):
    with pytest.raises(ValueError, match=f"{key}=.*: expected a positive number"):
        rescale(tiny_vit(), **{key: bad})


def test_unknown_maps_and_models():
    with pytest.raises(ValueError, match="unknown map 'LN3'; nearest known: .*LN1"):
        rescale(tiny_vit(), LN3=2)
    with pytest.raises(TypeError, match="qk-norm"):
        rescale(tiny_vit(qk_norm=True), LN1=2)


def test_a_map_too_large_for_the_precision():
    model = tiny_vit(embed_dim=24, num_classes=4).float()
    with pytest.raises(ValueError, match="write=10000000.0: .*too large for its precision"):
        rescale(model, write=1e7)


@pytest.mark.parametrize("name", [n for n in BUILD if n != "GPT-2 language head"])
def test_a_normal_form_is_one_for_all_twins(name):
    model, x = build(name), inputs_of(name, 3)
    form = normal_form(model)
    assert torch.allclose(logits(form, x), logits(model, x), rtol=1e-6, atol=1e-7)
    for key in ("LN1", "LN2", "VO", "QK") + ("stream",) * (name != "CLIP head"):
        twin = normal_form(rescale(model, **{key: 3.0}))
        for (n, p), q in zip(form.named_parameters(), twin.parameters()):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-8), (key, n)


def test_a_head_of_zeros_proves_nothing():
    model = build("torchvision")
    with torch.no_grad():
        for p in anatomy(model).head().values():
            p.zero_()
    form, x = normal_form(model), inputs_of("torchvision", 3)
    last = model.encoder.ln
    with torch.no_grad():
        tokens = [last(anatomy(m).tokens(x)) if m is model else m.encoder.ln(anatomy(m).tokens(x)) for m in (model, form)]
    assert torch.allclose(*tokens, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="too large for its precision"):
        rescale(model.float(), write=1e7)


def test_what_a_normal_form_looks_like():
    model = rescale(tiny_vit(embed_dim=24, init_values=0.3), LN1=5, stream=7, write=3, shift=1, read=2)
    form = normal_form(model)
    parts = anatomy(form)
    for b in form.blocks:
        assert torch.equal(b.ls1.gamma, torch.ones_like(b.ls1.gamma)) and not b.norm1.bias.any() and not b.norm2.bias.any()
        assert abs(b.norm1.weight.square().mean() - 1) < 1e-12
        for W, gamma in ((b.attn.qkv.weight, b.norm1.weight), (b.mlp.fc1.weight, b.norm2.weight)):
            assert (W @ gamma).abs().max() < 1e-12
        for writer in (b.attn.proj, b.mlp.fc2):
            assert writer.weight.mean(0).abs().max() < 1e-12 and abs(writer.bias.mean()) < 1e-12
    x = noise(8)
    with torch.no_grad():
        first = anatomy(normal_form(model, x)).embed(x)
    assert abs(first.square().mean() - 1) < 1e-9 and len(components(form)) == len(parts.components)


def test_names_of_twins():
    assert with_file("vit_tiny_patch16_224*LN1=8", "mine.safetensors") == "vit_tiny_patch16_224@mine.safetensors*LN1=8"
    assert with_file("vit_tiny_patch16_224", "mine.safetensors") == "vit_tiny_patch16_224@mine.safetensors"
    assert twin_name("vit_tiny_patch16_224.augreg_in21k") == ("vit_tiny_patch16_224.augreg_in21k", {})
    model, twin = vp.load("formula-vit-tiny"), vp.load("formula-vit-tiny*LN1=8*LN2=0.5")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(logits(model, x), logits(twin, x))
    assert torch.equal(twin.blocks[0].norm1.weight, 8 * model.blocks[0].norm1.weight)
    for name, said in (
        ("formula-vit*LN1=8.0", "expected LN1=8"), ("formula-vit*LN9=8", "LN1"), ("formula-vit*LN1", "as in LN1=8"), ("formula-vit*LN1=0", "positive"),
        ("formula-vit*LN1=2*LN1=4", "each map once"), ("formula-vit*", "map ''"), ("formula-wit*LN1=8", "formula-vit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            vp.load(name)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(qk_norm=True), "no QK, and no mix"),
        (dict(mlp_layer=SwiGLUPacked), "LN2 has two matrices to go into"),
        (dict(block_fn=ResPostBlock), "LN1, LN2, read and shift have no reader"),
    ],
)
def test_other_transformers_have_other_maps(options, said):
    model = tiny_vit(num_classes=4, **options) if "mlp_layer" not in options else VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3, **options)
    for ask in (lambda m: rescale(m, LN1=2), normal_form):
        with pytest.raises(TypeError, match=f"is not covered.*{said}"):
            ask(model)
