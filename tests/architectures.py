"""Small models of every architecture with random weights everywhere, and their weights read directly, by names that no adapter hands out."""
import torch
from conftest import tiny_vit
from timm.models.eva import Eva
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    ViTForImageClassification,
    ViTModel,
)
from transformers import ViTConfig as HFConfig

EVA = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4, mlp_ratio=2.0, num_reg_tokens=2, use_abs_pos_emb=False, use_rot_pos_emb=True)
DINO = EVA | dict(rope_type="dinov3", rope_rotate_half=True, init_values=0.1, use_fc_norm=False)
HF = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=8, num_labels=4)
DINO2 = {k: v for k, v in HF.items() if k != "intermediate_size"} | dict(mlp_ratio=2, layerscale_value=0.1)
TOWER = HF | dict(hidden_act="gelu")
GPT = dict(n_embd=24, n_layer=2, n_head=3, n_positions=9, vocab_size=50, num_labels=4, pad_token_id=0)
BUILD = {
    "timm": lambda: tiny_vit(embed_dim=24, num_classes=4, init_values=0.1, reg_tokens=1).float(),
    "DINOv3": lambda: Eva(**DINO, qkv_bias=False),
    "DINOv3 qkvb": lambda: Eva(**DINO, qkv_bias=True),
    "Eva unfused": lambda: Eva(**DINO, qkv_bias=True, qkv_fused=False),
    "Eva rope attention": lambda: Eva(**EVA, attn_type="rope", qkv_bias=True),
    "Eva mixed": lambda: Eva(**EVA, rope_type="mixed"),
    "Eva dynamic": lambda: Eva(**DINO, dynamic_img_size=True),
    "Eva absolute": lambda: Eva(**EVA | dict(use_rot_pos_emb=False, use_abs_pos_emb=True)),
    "torchvision": lambda: TorchvisionViT(16, 8, 2, 3, 24, 40, num_classes=4),
    "transformers ViT": lambda: ViTModel(HFConfig(**HF)),
    "transformers ViT head": lambda: ViTForImageClassification(HFConfig(**HF, qkv_bias=False)),
    "DeiT": lambda: DeiTModel(DeiTConfig(**HF)),
    "DeiT head": lambda: DeiTForImageClassification(DeiTConfig(**HF, qkv_bias=False)),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**DINO2)),
    "DINOv2 head": lambda: Dinov2ForImageClassification(Dinov2Config(**DINO2, qkv_bias=False)),
    "DINOv2 registers head": lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**DINO2, num_register_tokens=3)),
    "CLIP": lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)),
    "CLIP head": lambda: CLIPForImageClassification(CLIPConfig(vision_config=TOWER | dict(hidden_act="quick_gelu"), num_labels=4)),
    "GPT-2": lambda: GPT2Model(GPT2Config(**GPT)),
    "GPT-2 language head": lambda: GPT2LMHeadModel(GPT2Config(**GPT, attn_implementation="eager", scale_attn_by_inverse_layer_idx=True)),
    "GPT-2 class head": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT)),
}
SEQUENCES = [name for name in BUILD if name.startswith("GPT-2")]
HEADED = [name for name in BUILD if name not in ("transformers ViT", "DeiT", "DINOv2", "CLIP", "GPT-2", "GPT-2 language head")]
# of transformers: prefix of a block, attention, norms, projection, their eps
LAYOUTS = {
    "transformers": ("vit.layers", "attention", ("layernorm_before", "layernorm_after"), "o_proj", 1e-12),
    "DeiT": ("deit.layers", "attention", ("layernorm_before", "layernorm_after"), "o_proj", 1e-12),
    "DINOv2": ("dinov2.encoder.layer", "attention", ("norm1", "norm2"), "o_proj", 1e-6),
    "DINOv2 registers": ("dinov2_with_registers.encoder.layer", "attention", ("norm1", "norm2"), "o_proj", 1e-6),
    "CLIP": ("vision_model.encoder.layers", "self_attn", ("layer_norm1", "layer_norm2"), "out_proj", 1e-5),
}


def layout_of(name):
    "The layout of a transformers model whose blocks are Vision Transformers, or None; the prefix as this model has it."
    if not (mine := [n for n in LAYOUTS if name.startswith(n)]):
        return None
    prefix, *rest = LAYOUTS[max(mine, key=len)]
    return (prefix if name in HEADED else prefix.split(".", 1)[1], *rest)


def build(name, seed=0):
    "The model in float64 and evaluation mode."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILD[name]().double().eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def inputs_of(name, n, seed=0):
    "n random images, or sequences of token numbers."
    g = torch.Generator().manual_seed(seed)
    if name in SEQUENCES:
        return torch.randint(1, 50, (n, 6), generator=g)  # 0 is the padding
    return torch.randn(n, 3, 16, 16, generator=g, dtype=torch.float64)


def qkv(state, prefix, names):
    "Three matrices and their biases, zeros for those that are missing."
    return [(w := state[f"{prefix}.{n}.weight"], state.get(f"{prefix}.{n}.bias", w.new_zeros(len(w)))) for n in names]


def turner(model, i):
    "The rotation of queries or keys (heads, n, d_head) of an Eva, written out."
    angles = model.rope.get_embed([2, 2]) if model.dynamic_img_size else model.rope.get_embed()
    sin, cos = (angles[i] if model.rope_mixed else angles).double().chunk(2, -1)
    half = model.blocks[i].attn.rotate_half

    def turn(q):
        kept, x = q[:, :3], q[:, 3:]
        if half:
            a, b = x.chunk(2, -1)
            other = torch.cat([-b, a], -1)
        else:
            other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return torch.cat([kept, x * cos + other * sin], 1)

    return turn


def blocks_of(name, model) -> list:
    "Per block: the weights, by plain names, and how attention uses them."
    s = {k: v.detach() for k, v in (model.state_dict() | dict(model.named_buffers())).items()}
    body = {"GPT-2 language head": "transformer.", "GPT-2 class head": "transformer."}.get(name, "")
    found = []
    for i in range(2):
        if name.startswith("GPT-2"):
            p = f"{body}h.{i}"
            names, mats = ("ln_1", "ln_2"), ("mlp.c_fc", "mlp.c_proj")
            three = list(zip(s[f"{p}.attn.c_attn.weight"].T.chunk(3), s[f"{p}.attn.c_attn.bias"].chunk(3)))
            out = (s[f"{p}.attn.c_proj.weight"].T, s[f"{p}.attn.c_proj.bias"])
            linear = [(s[f"{p}.{m}.weight"].T, s[f"{p}.{m}.bias"]) for m in mats]
            eps, act = 1e-5, "tanh"
        elif layout := layout_of(name):
            prefix, attn, names, last, eps = layout
            p = f"{prefix}.{i}"
            three = qkv(s, f"{p}.{attn}", ("q_proj", "k_proj", "v_proj"))
            (out,) = qkv(s, f"{p}.{attn}", (last,))
            linear, act = qkv(s, p, ("mlp.fc1", "mlp.fc2")), "quick" if name == "CLIP head" else "none"
        elif name == "torchvision":
            p = f"encoder.layers.encoder_layer_{i}"
            names, mats = ("ln_1", "ln_2"), ("mlp.0", "mlp.3")
            three = list(zip(s[f"{p}.self_attention.in_proj_weight"].chunk(3), s[f"{p}.self_attention.in_proj_bias"].chunk(3)))
            (out,) = qkv(s, f"{p}.self_attention", ("out_proj",))
            linear, eps, act = qkv(s, p, mats), 1e-6, "none"
        else:
            p = f"blocks.{i}"
            names, mats = ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")
            if f"{p}.attn.q_proj.weight" in s:
                three = qkv(s, f"{p}.attn", ("q_proj", "k_proj", "v_proj"))
            else:
                W = s[f"{p}.attn.qkv.weight"]
                if f"{p}.attn.q_bias" in s:
                    b = torch.cat([s[f"{p}.attn.q_bias"], torch.zeros_like(s[f"{p}.attn.q_bias"]), s[f"{p}.attn.v_bias"]])
                else:
                    b = s.get(f"{p}.attn.qkv.bias", W.new_zeros(len(W)))
                three = list(zip(W.chunk(3), b.chunk(3)))
            (out,) = qkv(s, f"{p}.attn", ("proj",))
            linear, eps, act = qkv(s, p, mats), 1e-6, "none"
        scales = [s.get(f"{p}.{k}", 1.0) for k in ("gamma_1", "gamma_2")]
        if name == "timm":
            scales = [s[f"{p}.{k}.gamma"] for k in ("ls1", "ls2")]
        if name.startswith("DINOv2"):
            scales = [s[f"{p}.layer_scale{k}.lambda1"] for k in (1, 2)]
        norms = [(s[f"{p}.{n}.weight"], s[f"{p}.{n}.bias"], eps) for n in names]
        rope = turner(model, i) if name.startswith(("DINOv3", "Eva")) and model.rope is not None else None
        scale = 8**-0.5 / (i + 1 if name == "GPT-2 language head" else 1)
        found.append(dict(norms=norms, three=three, out=out, linear=linear, act=act, scales=scales, rope=rope, scale=scale, causal=name in SEQUENCES))  # fmt: skip
    return found


def attention(b, x):
    "The attention of a block on tokens x (n, d), head by head."
    n, heads = len(x), 3
    result = b["out"][1].expand(n, -1)
    q, k, v = ((x @ W.T + c).view(n, heads, -1).transpose(0, 1) for W, c in b["three"])
    if b["rope"] is not None:
        q, k = b["rope"](q), b["rope"](k)
    for h in range(heads):
        score = q[h] @ k[h].T * b["scale"]
        if b["causal"]:
            score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        weight = (score - score.amax(1, True)).exp()
        weight = weight / weight.sum(1, True)
        result = result + weight @ v[h] @ b["out"][0][:, 8 * h : 8 * h + 8].T
    return result


def norm(weights, x):
    gamma, beta, eps = weights
    centred = x - x.mean(-1, keepdim=True)
    return gamma * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + beta


def five(b, x, protocol) -> tuple:
    "(input, output) of the five components of a block for tokens x (n, d), and the tokens after the block."
    W1, c1 = b["linear"][0]
    W2, c2 = b["linear"][1]
    if protocol == "embedding":
        wide = torch.cat([x, x.new_zeros(len(x), W2.shape[1] - x.shape[1])], 1)
        return [(x, norm(b["norms"][0], x)), (x, attention(b, x)), (x, norm(b["norms"][1], x)), (x, x @ W1.T + c1), (wide, wide @ W2.T + c2)], x
    h = norm(b["norms"][0], x)
    a = attention(b, h)
    x2 = x + b["scales"][0] * a
    k = norm(b["norms"][1], x2)
    u = k @ W1.T + c1
    v = u * (1.702 * u).sigmoid() if b["act"] == "quick" else torch.nn.functional.gelu(u, approximate=b["act"])
    y = v @ W2.T + c2
    return [(x, h), (h, a), (x2, k), (k, u), (v, y)], x2 + b["scales"][1] * y
