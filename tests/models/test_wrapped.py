"""Models inside wrappers, and layers inside adapters: what is measured is what the network computes."""
import copy

import peft
import pytest
import torch
from conftest import noise, tiny_vit
from architectures import build, inputs_of
from torch import nn
from torch.nn.utils import parametrize, prune

import vitplast as vp

LAYERS = {"timm": ["qkv", "proj", "fc1"], "transformers ViT": ["q_proj", "o_proj", "fc2"], "GPT-2": ["c_attn", "c_proj"]}


def same(frames, column):
    "Whether a column of two frames is the same up to rounding."
    return torch.allclose(*(torch.tensor(f[column].to_numpy()) for f in frames), rtol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_adapters_are_measured_as_their_merged_weights(name):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=LAYERS[name], init_lora_weights=False, fan_in_fan_out=name == "GPT-2")
    wrapped = peft.get_peft_model(build(name), config).eval()
    merged, x = copy.deepcopy(wrapped).merge_and_unload().eval(), inputs_of(name, 4)
    y, frozen = x.flip(0), [n for n, p in wrapped.named_parameters() if not p.requires_grad]
    for model in (wrapped, wrapped.base_model.model):
        for fast in (None, False, True):
            assert same([vp.plasticity(m, x, y, fast=fast) for m in (model, merged)], "plasticity")
        assert same([vp.bounds(m, x, inputs="native") for m in (model, merged)], "bound")
    with pytest.raises(ValueError, match="carries an adapter: to train .* would thaw the weights under it"):
        vp.trainable(wrapped, "all")
    assert frozen == [n for n, p in wrapped.named_parameters() if not p.requires_grad]


def test_layers_that_make_their_weights_are_measured_as_they_compute():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    x, y, expected = noise(3), noise(3, seed=1), tiny_vit()
    made, pruned = tiny_vit(), tiny_vit()
    with torch.no_grad():
        for block in expected.blocks:
            block.mlp.fc1.weight.mul_(2)
    for block in made.blocks:
        parametrize.register_parametrization(block.mlp.fc1, "weight", Twice())
    assert same([vp.bounds(m, x) for m in (made, expected)], "bound")
    prune.random_unstructured(pruned.blocks[0].mlp.fc2, "weight", 0.5)
    bare = tiny_vit()
    bare.blocks[0].mlp.fc2.load_state_dict({"weight": pruned.blocks[0].mlp.fc2.weight.detach(), "bias": pruned.blocks[0].mlp.fc2.bias.detach()})
    assert same([vp.bounds(m, x) for m in (pruned, bare)], "bound") and same([vp.plasticity(m, x, y) for m in (pruned, bare)], "plasticity")


def test_what_is_not_linear_is_refused():
    class Rounded(nn.Linear):
        def forward(self, x):
            return (super().forward(x) * 2).round() / 2

    model = tiny_vit()
    model.blocks[0].mlp.fc1 = Rounded(12, 24).double()
    with pytest.raises(TypeError, match="a Rounded is not covered: what it computes is not linear"):
        vp.bounds(model, noise(3))


def test_wrappers_that_change_nothing_are_looked_through(stripes):
    plain, x, y = tiny_vit(num_classes=2), noise(3), noise(3, seed=1)
    expected = vp.plasticity(plain, x, y)
    for model in (torch.compile(plain), nn.DataParallel(plain), nn.DataParallel(torch.compile(plain))):
        assert vp.plasticity(model, x, y).equals(expected)
        assert [c.name for c in vp.components(model)] == [c.name for c in vp.components(plain)]
        with vp.trainable(model, "MHA") as training:
            assert {n for n, p in plain.named_parameters() if p.requires_grad} == set(training.names) > {"blocks.0.attn.qkv.weight"}
        run = vp.finetune(model, stripes, "LN1", vp.FinetuneConfig(steps=2, eval_every=2))
        assert type(run.model) is type(plain)


def test_other_wrappers_are_told_what_to_pass():
    class Lit(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.classifier = tiny_vit(), nn.Linear(12, 3)

    with pytest.raises(TypeError, match=r"Lit is not covered.*It holds a VisionTransformer: pass model.get_submodule\(.net.\); classifier.weight, classifier.bias lie outside of it, and stay as they are"):
        vp.components(Lit())
    with pytest.raises(TypeError, match=r"Sequential is not covered.*It holds a VisionTransformer: pass model.get_submodule\(.0.\)\.$"):
        vp.components(nn.Sequential(tiny_vit()))
    with pytest.raises(TypeError, match="Linear is not covered") as caught:
        vp.components(nn.Linear(2, 2))
    assert "It holds" not in str(caught.value)
    with pytest.raises(TypeError, match="model 'formula-vit' is a str: expected a network, as vp.load gives it"):
        vp.plasticity("formula-vit", noise(2), noise(2))
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=24, num_layers=2, num_attention_heads=2)
    with pytest.raises(TypeError, match="its prompts are part of what it computes"):
        vp.components(peft.get_peft_model(build("GPT-2 class head"), prompts))
