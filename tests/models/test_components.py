"""Components: coverage, the matrices against the modules, refusals by name."""
import logging
import warnings
from functools import partial

import pytest
import timm
import torch
from conftest import noise, tiny_vit
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock, VisionTransformer

import vitplast as vp
from vitplast.models import INPUTS, KINDS, anatomy, evaluating, visit

VARIANTS = {
    "plain": {},
    "no class token": dict(class_token=False, global_pool="avg"),
    "registers": dict(reg_tokens=3),
    "layer scale": dict(init_values=0.1),
    "no biases": dict(qkv_bias=False, proj_bias=False),
    "wide MLP": dict(mlp_ratio=5.0),
    "narrow MLP": dict(mlp_ratio=0.5),
    "one block": dict(depth=1),
    "norm before the blocks": dict(pre_norm=True),
    "one channel": dict(in_chans=1),
    "with head": dict(num_classes=5),
    "RMSNorm": dict(norm_layer="rmsnorm"),
    "RMSNorm of torch": dict(norm_layer=partial(torch.nn.RMSNorm, eps=1e-6)),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_of_a_block_is_covered_once(options):
    model = tiny_vit(**options)
    parts = anatomy(model)
    covered = [n for c in parts.components for n in c.parameters] + list(parts.rest)
    assert sorted(covered) == sorted(n for n, _ in model.named_parameters() if n.startswith("blocks."))
    assert [(c.block, c.kind) for c in parts.components] == [(b, k) for b in range(len(model.blocks)) for k in KINDS]
    assert {c.depth for c in parts.components} == ({0.0} if len(model.blocks) == 1 else {0.0, 1.0})
    parameters = dict(model.named_parameters())
    assert all(p is parameters[n] for c in parts.components for n, p in c.parameters.items())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_weights_say_what_the_module_computes(options):
    model = tiny_vit(**options)
    g = torch.Generator().manual_seed(1)
    for c in vp.components(model):
        x, w = torch.randn(4, c.width, generator=g, dtype=torch.float64), c.weights()
        if c.kind in ("LN1", "LN2"):
            centred = [t - t.mean() * w.centred for t in x]
            expected = torch.stack([w.gamma * t / (t.square().mean() + w.eps).sqrt() + w.beta for t in centred])
        elif c.kind == "MHA":
            expected = w.b_o.expand(4, -1)
            for h in range(len(w.Q)):
                scores = torch.stack([torch.stack([(w.Q[h] @ a + w.b_q[h]) @ (w.K[h] @ b + w.b_k[h]) * w.scale for b in x]) for a in x])
                weight = scores.exp() / scores.exp().sum(1, True)
                expected = expected + weight @ (x @ w.V[h].T + w.b_v[h]) @ w.O[h].T
        else:
            expected = x @ w.W.T + w.b
        with torch.no_grad():
            assert torch.allclose(c(x[None])[0], expected, atol=1e-12), c


def only_plain_names(block) -> bool:
    "Whether the parameters of a block are those of five plain components and LayerScale, the MLP not gated."
    names = {n.rpartition(".")[0] for n, _ in block.named_parameters()}
    mlp = block.mlp
    gated = not hasattr(mlp, "fc1") or mlp.fc2.in_features != mlp.fc1.out_features
    differential = any("lambda" in n for n, _ in block.named_parameters())
    own = {"", "attn", "attn.q_proj", "attn.k_proj", "attn.v_proj"} if type(block) is EvaBlock else {"ls1", "ls2"}
    return names <= own | {"norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"} and not gated and not differential


def shallow(name):
    "A timm model of two blocks where its blocks are built alike."
    try:
        return timm.create_model(name, depth=2)
    except (AssertionError, IndexError):  # it lists something for every block
        return timm.create_model(name)


def test_every_timm_vit_is_covered_or_refused_with_a_reason():
    logging.disable(logging.WARNING)
    covered, refused = [], {}
    for name in timm.list_models(["vit_*", "eva*"]):
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = shallow(name)
        plain = (type(model), type(getattr(model, "blocks", [0])[0])) in ((VisionTransformer, Block), (Eva, EvaBlock)) and all(map(only_plain_names, model.blocks))
        try:
            parts = anatomy(model)
        except TypeError as error:
            refused[name] = str(error)
            assert not plain, f"{name}: {error}"
            continue
        assert plain, name
        names = [n for c in parts.components for n in c.parameters] + list(parts.rest)
        assert sorted(names) == sorted(n for n, _ in model.named_parameters() if n.startswith("blocks.")), name
        covered.append(name)
    logging.disable(logging.NOTSET)
    assert {"vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224", "vit_base_patch14_reg4_dinov2", "vit_base_patch16_dinov3", "vit_base_patch16_dinov3_qkvb", "vit_base_r50_s16_224"} <= set(covered)
    for name, reason in (("vit_giant_patch14_dinov2", "gated"), ("vit_base_patch16_rpn_224", "ResPostBlock"), ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
                         ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"), ("vit_huge_plus_patch16_dinov3", "gated"), ("vit_relpos_base_patch16_224", "RelPos")):  # fmt: skip
        assert reason in refused[name]


@pytest.mark.parametrize("options, reason", [
    (dict(qk_norm=True), "qk-norm"), (dict(scale_attn_norm=True), "output before the projection"), (dict(scale_mlp_norm=True), "between the layers"),
    (dict(mlp_layer=SwiGLUPacked), "gated"), (dict(block_fn=ResPostBlock, init_values=1e-5), "post-norm"), (dict(block_fn=ParallelScalingBlock), "parallel"),
    (dict(norm_layer=torch.nn.RMSNorm), "eps of its RMSNorm is None"), (dict(norm_layer="simplenorm"), "SimpleNorm, expected LayerNorm or RMSNorm"),
])  # fmt: skip
def test_other_functions_are_refused_by_name(options, reason):
    with pytest.raises(TypeError, match=reason):
        vp.components(VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3, **options))


def test_other_classes_are_refused_with_what_is_supported():
    with pytest.raises(TypeError, match="Linear is not covered; supported, pre-norm: timm.Eva, timm.VisionTransformer, torchvision.VisionTransformer, .*ViT"):
        vp.components(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="distillation"):
        vp.components(timm.create_model("deit_tiny_distilled_patch16_224"))


def test_native_inputs_are_those_of_the_forward_pass(model):
    images, seen = noise(2), {}
    with evaluating(model):
        visit(anatomy(model), images, "native", lambda i, c, a, b: seen.update({(c.block, c.kind): (a, b)}))
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for i, block in enumerate(model.blocks):  # written out
            h = block.norm1(x)
            a = block.attn(h)
            x2 = x + a
            k = block.norm2(x2)
            u = block.mlp.fc1(k)
            v = torch.nn.functional.gelu(u)
            y = block.mlp.fc2(v)
            for kind, pair in zip(KINDS, ((x, h), (h, a), (x2, k), (k, u), (v, y))):
                assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(seen[i, kind], pair)), (i, kind)
            x = x2 + y
    assert torch.allclose(anatomy(model).tokens(images), x)


@pytest.mark.parametrize("inputs", INPUTS)
def test_nothing_is_left_behind_after_an_error(model, inputs):
    model.train()
    model.blocks[0].eval()

    def fail(*_):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), evaluating(model):
        assert not model.training
        visit(anatomy(model), noise(1), inputs, fail)
    assert model.training and not model.blocks[0].training and not model.blocks[0].attn.training and model.blocks[1].training
    assert not any(m._forward_hooks for m in model.modules())


def test_unknown_input_protocol(model):
    with pytest.raises(ValueError, match="inputs='natve': expected one of"):
        visit(anatomy(model), noise(1), "natve", lambda *_: None)
