"""Every architecture: coverage, freezing, gradients, plasticity and bounds against the weights read directly."""
import copy
import logging
import math

import pytest
import timm
import torch
from architectures import BUILD, HEADED, SEQUENCES, blocks_of, build, five, inputs_of, layout_of
from timm.models.eva import Eva
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTModel,
)

import vitplast as vp
from vitplast.models import INPUTS, KINDS, anatomy, evaluating
from vitplast.models.huggingface import byte_tokens
from vitplast.theory import gradient_bounds

BLOCKS = {name: f"{layout_of(name)[0]}." for name in BUILD if layout_of(name)} | {"torchvision": "encoder.layers.", "GPT-2": "h.", "GPT-2 language head": "transformer.h.", "GPT-2 class head": "transformer.h."}  # fmt: skip


def first_and_last(name, model, x):
    "The tokens that enter the first block and leave the last one in the model's own forward pass."
    blocks, seen = model.get_submodule(BLOCKS.get(name, "blocks.")[:-1]), {}
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0])),
        blocks[-1].register_forward_hook(lambda _, args, out: seen.update(last=out)),
    ]
    with torch.no_grad():
        model(x)
    [hook.remove() for hook in hooks]
    return seen["first"], seen["last"]


@pytest.mark.parametrize("name", BUILD)
def test_every_parameter_of_a_block_is_covered_once(name):
    model = build(name)
    parts = anatomy(model)
    covered = [n for c in parts.components for n in c.parameters] + list(parts.rest)
    assert sorted(covered) == sorted(n for n, _ in model.named_parameters() if n.startswith(BLOCKS.get(name, "blocks.")))
    assert [(c.block, c.kind, c.depth) for c in parts.components] == [(b, k, float(b)) for b in range(2) for k in KINDS]
    outside = {**parts.final_norm, **parts.head()}
    assert not outside.keys() & set(covered) and all(dict(model.named_parameters())[n] is p for n, p in outside.items())
    assert bool(parts.head()) == (name in HEADED) and bool(parts.final_norm) == (name != "CLIP head")  # which reads the tokens before it


@pytest.mark.parametrize("name", BUILD)
def test_tokens_are_those_of_the_forward_pass(name):
    model, x = build(name), inputs_of(name, 2)
    parts = anatomy(model)
    first, last = first_and_last(name, model, x)
    with torch.no_grad():
        assert torch.equal(parts.embed(x), first) and torch.allclose(parts.tokens(x), last, atol=1e-12)
        expected = first
        for b in blocks_of(name, model):
            expected = torch.stack([five(b, t, "native")[1] for t in expected])
    assert torch.allclose(last, expected, atol=1e-10)  # so that the brute force below is the model's


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", BUILD)
def test_plasticity_is_that_of_the_weights_read_directly(name, inputs):
    model, x, y = build(name), inputs_of(name, 3), inputs_of(name, 3, seed=1)
    tokens = list(zip(first_and_last(name, model, x)[0], first_and_last(name, model, y)[0]))
    expected = []
    for b in blocks_of(name, model):
        both = [(five(b, a, inputs), five(b, c, inputs)) for a, c in tokens]
        for j in range(5):
            ratios = [(p[j][1] - q[j][1]).norm() / (p[j][0] - q[j][0]).norm() for (p, _), (q, _) in both]
            expected.append(torch.stack(ratios).mean().item())
        tokens = [(p, q) for (_, p), (_, q) in both]
    for fast in (False, True) if inputs == "embedding" else (None,):
        assert vp.plasticity(model, x, y, inputs=inputs, fast=fast).plasticity.tolist() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", BUILD)
def test_published_bounds_are_those_of_the_weights_read_directly(name):
    model, x = build(name), inputs_of(name, 3)
    tokens, expected = first_and_last(name, model, x)[0].detach(), []
    n, d = tokens.shape[1:]
    for b in blocks_of(name, model):
        for (gamma, _, eps), kind in zip(b["norms"], ("LN1", "LN2")):
            sigma = (tokens.var(-1, unbiased=False) + eps).sqrt().min()
            expected.append((b["rope"], kind, (gamma.abs().max() / sigma).item()))
        (Q, _), (K, _), (V, _) = ((W.view(3, -1, d), c) for W, c in b["three"])
        O, r, total = b["out"][0], tokens.norm(dim=-1).max(), 0.0
        for h in range(3):
            A = torch.linalg.matrix_norm(Q[h].T @ K[h] * b["scale"], 2)
            size = torch.linalg.matrix_norm(O[:, 8 * h : 8 * h + 8], 2) * torch.linalg.matrix_norm(V[h], 2)
            total += (size * math.sqrt(3 * n + (12 * n + 3) * (r**4 * A**2))).item()
        expected.append((b["rope"], "MHA", total))
        expected += [(b["rope"], kind, torch.linalg.matrix_norm(W, 2).item()) for (W, _), kind in zip(b["linear"], ("FC1", "FC2"))]
    frame = vp.bounds(model, x, kind="published")
    ours = [frame[(frame.block == i) & (frame.component == k)].iloc[0] for i in range(2) for k in ("LN1", "LN2", "MHA", "FC1", "FC2")]
    assert [row.bound for row in ours] == pytest.approx([e for _, _, e in expected], rel=1e-9)
    for row, (rope, kind, _) in zip(ours, expected):
        assert ("rotary" in row.reason) == (rope is not None and kind == "MHA")


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", BUILD)
def test_mean_at_most_max_at_most_lower_at_most_bound(name, inputs):
    model, x, y = build(name), inputs_of(name, 3), inputs_of(name, 3, seed=1)
    both = torch.cat([x, y])
    measured = vp.plasticity(model, x, y, inputs=inputs)
    sharp, hull = (vp.bounds(model, both, inputs=inputs, kind=k).bound for k in ("sharp", "hull"))
    lower = vp.lipschitz(model, both, inputs=inputs, iterations=20, steps=3).lower
    assert (measured.plasticity <= measured.max_ratio).all() and (measured.max_ratio <= hull * (1 + 1e-9)).all()
    assert (measured.max_ratio <= lower * (1 + 1e-9)).all() and (lower <= hull * (1 + 1e-6)).all() and (hull <= sharp * (1 + 1e-9)).all()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_chosen_gets_gradients_and_moves(name, kind):
    model, x = build(name), inputs_of(name, 4)
    parts = anatomy(model)
    parts.reset_head(3)
    parts = anatomy(model)
    chosen = {n for c in parts.components if c.kind == kind for n in c.parameters} | set(parts.head())
    training = vp.trainable(model, [kind])
    assert set(training.names) == chosen
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    logits = parts.logits(x)
    assert logits.shape == (4, 3)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == chosen
    assert all(p.grad.norm() > 0 for n, p in model.named_parameters() if n in chosen)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    still = {n for n in chosen if n.endswith("k_proj.bias")}  # their gradient is zero, up to rounding
    assert chosen - still <= moved <= chosen


@pytest.mark.parametrize("name", HEADED)
def test_gradients_stay_below_their_bounds(name):
    frame = gradient_bounds(build(name), inputs_of(name, 4), torch.tensor([0, 1, 2, 3]))
    assert (frame.gradient <= frame.bound).all() and (frame.gradient > 0).all()


@pytest.mark.parametrize("name", [name for name in BUILD if name not in HEADED])
def test_a_model_without_a_head_says_so(name):
    with pytest.raises(TypeError, match="has no classification head: expected a (ViTForImage|DeiTForImage|Dinov2ForImage|CLIPForImage|GPT2ForSequence)Classification"):
        anatomy(build(name)).reset_head(3)
    with pytest.raises(ValueError, match="the model has no head"):
        gradient_bounds(build(name), inputs_of(name, 2), torch.tensor([0, 1]))


def on_meta(name):
    logging.disable(logging.WARNING)
    with torch.device("meta"):
        model = timm.create_model(name)
    logging.disable(logging.NOTSET)
    return model


@pytest.mark.parametrize("name, blocks, width", [
    ("vit_base_patch16_224", 12, 768), ("vit_large_patch16_224", 24, 1024), ("vit_huge_patch14_224", 32, 1280),
    ("vit_small_patch16_dinov3", 12, 384), ("vit_base_patch16_dinov3", 12, 768), ("vit_base_patch16_dinov3_qkvb", 12, 768), ("vit_large_patch16_dinov3", 24, 1024),
])  # fmt: skip
def test_the_models_of_the_paper(name, blocks, width):
    model = on_meta(name)
    parts = anatomy(model)
    assert len(parts.components) == 5 * blocks and {c.width for c in parts.components} == {width, 4 * width}
    covered = [n for c in parts.components for n in c.parameters] + list(parts.rest)
    assert sorted(covered) == sorted(n for n, _ in model.named_parameters() if n.startswith("blocks."))
    assert bool(parts.components[1].weights().rotary) == ("dinov3" in name)


@pytest.mark.parametrize("name", ["vit_huge_plus_patch16_dinov3", "vit_small_plus_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_gated_mlps_are_refused(name):
    with pytest.raises(TypeError, match="MLP is .*gated"):
        anatomy(on_meta(name))


@pytest.mark.parametrize("options, reason", [
    (dict(qk_norm=True), "qk-norm"), (dict(scale_attn_inner=True), "before the projection"), (dict(scale_mlp=True), "between the layers"),
    (dict(use_post_norm=True), "EvaBlockPostNorm"), (dict(attn_type="rope", qkv_fused=False, num_kv_heads=1), "shared keys"),
])  # fmt: skip
def test_other_functions_of_eva_are_refused_by_name(options, reason):
    with pytest.raises(TypeError, match=reason):
        anatomy(Eva(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0, **options))


def test_other_functions_of_transformers_are_refused_by_name():
    small = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=8)
    with pytest.raises(TypeError, match="second, distillation head; expected a DeiTForImageClassification"):
        anatomy(DeiTForImageClassificationWithTeacher(DeiTConfig(**small)))
    with pytest.raises(TypeError, match="MLP is Dinov2SwiGLUFFN"):
        anatomy(Dinov2Model(Dinov2Config(**small, use_swiglu_ffn=True)))
    with pytest.raises(TypeError, match=r"It holds a CLIPVisionModel: pass model.get_submodule\('vision_model'\); logit_scale"):
        anatomy(CLIPModel(CLIPConfig(vision_config=small, text_config=dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8))))
    with pytest.raises(TypeError, match="cross attention"):
        anatomy(GPT2Model(GPT2Config(n_embd=12, n_layer=1, n_head=3, add_cross_attention=True)))
    vit = ViTModel(ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=8))
    vit.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match="'flash_attention_2'; expected attn_implementation=\"sdpa\""):
        anatomy(vit)


@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 head", "DINOv2 registers head"])
def test_dinov2_is_measured_in_the_size_of_its_image_processor(name):
    model = build(name)
    assert anatomy(model).image_shape == (3, 16, 16)
    model.pretrained_cfg = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    parts = anatomy(model)
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        assert parts.image_shape == (3, 24, 24) and torch.equal(parts.embed(x), first_and_last(name, model, x)[0])
    assert len(vp.plasticity(model, x, x.flip(0))) == 10


def test_a_new_class_of_a_known_library_inherits_its_adapter():
    class Mine(TorchvisionViT):
        pass

    assert len(vp.components(Mine(16, 8, 1, 3, 24, 40))) == 5


def test_reset_head_of_torchvision_replaces_all_its_layers():
    model = TorchvisionViT(16, 8, 1, 3, 24, 40, representation_size=7)
    parts = anatomy(model)
    assert {n.split(".")[1] for n in parts.head()} == {"pre_logits", "head"}
    parts.reset_head(5)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 5) and list(parts.head()) == ["heads.head.weight", "heads.head.bias"]


@pytest.mark.parametrize("x, message", [
    (torch.zeros(2, 6), "float32, expected token numbers in torch.int64"), (torch.zeros(2, 10, dtype=torch.long), r"shape \(2, 10\), expected \(N, n\) with n from 1 to 9"),
    (torch.full((2, 3), 50), "numbers from 50 to 50, expected 0 to 49"), (torch.full((2, 3), -1), "numbers from -1"), (torch.zeros(2, 0, dtype=torch.long), r"\(2, 0\)"),
])  # fmt: skip
def test_bad_sequences(x, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vp.plasticity(build("GPT-2"), x, x)


def test_bounds_of_gpt2_without_sequences_take_its_longest():
    assert set(vp.bounds(build("GPT-2"), radius=3.0).n_tokens.dropna()) == {9}


def test_dropout_is_off_while_measuring():
    model = build("GPT-2").train()
    x, y = inputs_of("GPT-2", 3), inputs_of("GPT-2", 3, seed=1)
    a, b = vp.plasticity(model, x, y), vp.plasticity(model, x, y)
    assert a.equals(b) and model.training and model.h[0].attn.attn_dropout.training


def test_byte_tokens():
    assert byte_tokens("!A ~\n", 5).tolist() == [[0, 32, 220, 93, 198]]  # of GPT-2's published vocabulary
    ids = byte_tokens("".join(map(chr, range(128))) + "äöü€" * 40, 7)
    assert ids.shape[1] == 7 and 0 <= ids.min() <= ids.max() < 256
    raw = "ÿé!".encode()
    assert len(set(byte_tokens("ÿé!", len(raw)).flatten().tolist())) == len(set(raw))
    with pytest.raises(ValueError, match="length=4: expected 1 to 3"):
        byte_tokens("abc", 4)


def test_evaluating_a_sequence_model_changes_nothing():
    model = build("GPT-2 class head")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with evaluating(model):
        anatomy(model).tokens(inputs_of("GPT-2", 2))
    assert SEQUENCES and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["DINOv3 qkvb", "torchvision", "transformers ViT head"])
def test_finetuning_and_probing_any_architecture(name, stripes):
    model = build(name).float()
    if name.startswith("transformers"):
        with pytest.raises(ValueError, match="does not say how its images are normalised: expected model.pretrained_cfg"):
            vp.linear_probe(model, stripes)
        model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = vp.finetune(model, stripes, ["FC1"], vp.FinetuneConfig(steps=40, eval_every=20, lr=0.03))
    assert run.history.loss.iloc[-5:].mean() < run.history.loss.iloc[:5].mean() and 0 <= vp.linear_probe(model, stripes) <= 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


DENSE = ["timm", "DINOv3 qkvb", "Eva rope attention", "Eva absolute", "Eva dynamic"]


def maps_by_hand(model, x):
    "One linear layer on each normed patch, drawn out to 16 pixels by the weights of linear interpolation."
    tokens = model.fc_norm(model.forward_features(x))[:, -4:]  # two by two patches, behind class and registers
    answers = (tokens @ model.head.weight.T + model.head.bias).view(len(x), 2, 2, -1)
    share = ((torch.arange(16, dtype=torch.float64) + 0.5) / 8 - 0.5).clamp(0, 1)  # of the second patch
    weights = torch.stack([1 - share, share])
    return torch.einsum("nijc,iy,jx->ncyx", answers, weights, weights)


@pytest.mark.parametrize("name", DENSE)
def test_a_head_on_every_patch(name):
    model, x = build(name), inputs_of(name, 3)
    names, before = [n for n, _ in model.named_parameters()], anatomy(model).logits(x)
    assert before.shape == (3, 4) and torch.equal(before, model(x))
    parts = anatomy(model)
    parts.dense_head(5)
    with torch.no_grad():
        model.head.bias.normal_()
    assert [n for n, _ in model.named_parameters()] == names  # nothing is wrapped
    assert parts.logits(x).shape == (3, 5, 16, 16) and torch.equal(parts.logits(x), anatomy(model).logits(x))
    assert torch.allclose(parts.logits(x), maps_by_hand(model, x), atol=1e-12)


@pytest.mark.parametrize("name", DENSE)
def test_a_head_for_pictures_can_be_put_back(name):
    model, x = build(name), inputs_of(name, 3)
    head, expected = {n: p.clone() for n, p in anatomy(model).head().items()}, model(x)
    anatomy(model).dense_head(5)
    anatomy(model).dense_head(2)  # twice, and by anatomies that never saw the pooling
    anatomy(copy.deepcopy(model)).reset_head(4)
    anatomy(model).reset_head(4)
    model.load_state_dict(head, strict=False)
    assert torch.equal(anatomy(model).logits(x), expected)


def test_models_without_a_head_for_pixels():
    assert anatomy(build("torchvision")).dense_head is None and anatomy(build("GPT-2 class head")).dense_head is None
    mapped = timm.models.vision_transformer.VisionTransformer(16, 8, embed_dim=24, depth=1, num_heads=3, global_pool="map")
    assert anatomy(mapped).dense_head is None  # the pooling has weights of its own
    unpooled = timm.models.vision_transformer.VisionTransformer(16, 8, embed_dim=24, depth=1, num_heads=3, global_pool="")
    assert anatomy(unpooled).logits(torch.zeros(1, 3, 16, 16)).shape == (1, 1000, 16, 16)
    with pytest.raises(TypeError, match="it pools no tokens, expected global_pool='token' or 'avg'"):
        anatomy(unpooled).reset_head(3)


def test_the_patches_of_a_picture_that_is_no_square():
    model = timm.models.vision_transformer.VisionTransformer((16, 24), 8, embed_dim=24, depth=1, num_heads=3).double().eval()
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    anatomy(model).dense_head(3)
    answers = model.head(model.forward_features(x))[:, 1:].transpose(1, 2).reshape(2, 3, 2, 3)
    assert torch.allclose(anatomy(model).logits(x), torch.nn.functional.interpolate(answers, size=(16, 24), mode="bilinear"))
