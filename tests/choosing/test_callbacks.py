"""Callbacks in the real Trainers of Lightning and transformers: what is chosen trains, at its rate, nothing else moves, and the folder comes back to the last bit."""
import copy
import json
import logging
import sys
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from architectures import build
from conftest import noise, tiny_vit
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessor

import vitplast as vp
from vitplast.choosing import lightning_callback, param_groups, trainer_callback
from vitplast.choosing.callbacks import lightning_class, trainer_class
from vitplast.models import anatomy
from vitplast.training import merge, read_note

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
RATES = {"MHA@-1:": 1e-3, "LN1": 8e-3}
ABOUT = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
X, Y = noise(48), torch.arange(48) % 3


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning|transformers|torch|accelerate")
        yield


class Module(L.LightningModule):
    def __init__(self, net, schedule=lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), optimizer=lambda m: AdamW(m.parameters(), lr=1e-4)):
        super().__init__()
        self.net, self.schedule, self.make = net, schedule, optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, i):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.make(self)
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}] if self.schedule else []


def fit(module, *callbacks, steps=4, resume=None, **options):
    "Lightning's smallest training, in the order of the data."
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": any(isinstance(c, L.callbacks.ModelCheckpoint) for c in callbacks)}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **quiet | options)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 8), ckpt_path=resume)
    return trainer


def rows():
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(X, Y)]


def trainer_of(model, folder, *callbacks, steps=4, optimizer=AdamW, trainer=Trainer, **options):
    "The smallest Trainer of transformers."
    extra = {k: options.pop(k) for k in ("optimizers", "processing_class", "model_init") if k in options}
    if optimizer and "optimizers" not in extra and model is not None:
        extra["optimizers"] = (optimizer(model.parameters(), lr=1e-4), None)
    settings = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8, "max_steps": steps, "warmup_steps": 2}
    return trainer(model, TrainingArguments(folder, **settings | options), train_dataset=rows(), callbacks=list(callbacks), **extra)


def headed(seed=0, **options):
    model = tiny_vit(seed, num_classes=3, **options)
    model.pretrained_cfg = dict(ABOUT)
    return model


def hugging():
    model = build("transformers ViT head")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        anatomy(model).reset_head(3)
    model.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    return model


def logits(model):
    with torch.no_grad():
        return anatomy(model).logits(X[:8])


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def by_hand(name):
    "The rate of a parameter of either network, by its name alone."
    if "norm1" in name or "layernorm_before" in name:
        return RATES["LN1"]
    if "blocks.1.attn" in name or "layers.1.attention" in name:
        return RATES["MHA@-1:"]
    return 8e-3 if name.startswith(("head", "classifier")) else None


def check_comes_back(folder, net, base, steps, other):
    "What trained is what was chosen; the folder gives the same logits upon its base, and refuses another."
    before = state(base)
    moved = {n for n, p in state(net).items() if n in before and before[n].shape == p.shape and not torch.equal(p, before[n])}
    wanted = {n for n in before if by_hand(n)}
    assert moved - anatomy(base).head().keys() == wanted - anatomy(base).head().keys()
    again = vp.load_run(folder, base)
    assert torch.equal(logits(again.model), logits(net.eval()))
    assert again.n_trained == sum(p.numel() for n, p in net.named_parameters() if by_hand(n))
    assert again.config["steps"] == steps and again.config["rates"] == RATES | {"head": 8e-3}
    for name in ("validation_accuracy", "test_accuracy", "best_step", "diverged", "seconds"):
        assert getattr(again, name) is None
    assert len(again.history) == 0 and again.components == "LN1+MHA@1"
    card = (folder / "README.md").read_text()
    assert "accuracy" not in card and "None" not in card and "LN1 at 0.008" in card
    with pytest.raises(ValueError, match="weights of this .* are others"):
        vp.load_run(folder, other)
    return again


def test_lightning_trains_what_is_chosen_and_keeps_it(tmp_path):
    net, base = headed(), headed()
    fit(Module(net), lightning_callback(RATES, tmp_path / "run", classes="ant bee cat".split(), task="insects"))
    other = headed()
    with torch.no_grad():
        other.norm.bias[0] += 1e-12
    again = check_comes_back(tmp_path / "run", net, base, 4, other)
    assert again.classes == ("ant", "bee", "cat") and again.task == "insects"
    assert read_note(tmp_path / "run")["config"]["loop"] == f"lightning {L.__version__}"


def test_the_trainer_trains_what_is_chosen_and_keeps_it(tmp_path):
    net, base, other = hugging(), hugging(), hugging()
    about = ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3, size={"height": 16, "width": 16})
    trainer_of(net, tmp_path / "out", trainer_callback(RATES, tmp_path / "run"), processing_class=about).train()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-12
    again = check_comes_back(tmp_path / "run", net, base, 4, other)
    note = read_note(tmp_path / "run")
    assert again.classes == ("ant", "bee", "cat") and note["mean"] == [0.5, 0.4, 0.3] and note["std"] == [0.2] * 3 and note["task"] is None
    assert "# ViTForImageClassification, finetuned\n" in (tmp_path / "run/README.md").read_text()


class Watch(L.Callback):
    "Rates of every step by parameter."

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, *_):
        self.see(module.net, trainer.optimizers[0])

    def see(self, net, optimizer):
        names = {id(p): n for n, p in net.named_parameters()}
        self.seen.append({names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]})


class WatchTrainer(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model, optimizer, **_):
        Watch.see(self, model, optimizer)


def check_rates_seen(seen, shape, net):
    assert len(seen) == len(shape)
    for found, factor in zip(seen, shape):
        assert found == pytest.approx({n: by_hand(n) * factor for n, _ in net.named_parameters() if by_hand(n)}, rel=1e-12)


def test_every_step_has_the_rates_and_is_the_step_of_groups_from_the_beginning():
    net, plain, watch = headed(), headed(), Watch()
    fit(Module(net), lightning_callback(RATES), watch, steps=5)
    check_rates_seen(watch.seen, [1 / (1 + t) for t in range(5)], net)
    fit(Module(plain, optimizer=lambda m: AdamW(param_groups(m.net, RATES))), steps=5)
    for (n, p), q in zip(net.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_every_step_of_the_trainer_too(tmp_path):
    net, plain, watch = hugging(), hugging(), WatchTrainer()
    trainer_of(net, tmp_path, trainer_callback(RATES), watch, steps=6).train()
    check_rates_seen(watch.seen, [0, 0.5, 1, 0.75, 0.5, 0.25], net)
    trainer_of(plain, tmp_path, steps=6, optimizers=(AdamW(param_groups(plain, RATES)), None)).train()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters()))


def test_without_rates_those_of_the_optimizer_stay(tmp_path):
    net, watch = headed(), Watch()
    fit(Module(net, schedule=lambda o: OneCycleLR(o, 0.01, 10)), lightning_callback("ln1", tmp_path / "a"), watch, steps=2)
    assert {n for n, p in state(net).items() if not torch.equal(p, state(headed())[n])} == {n for n in state(net) if "norm1" in n or n.startswith("head")}
    assert all(lr == pytest.approx(0.01 / 25, rel=1e-12) for lr in watch.seen[0].values())
    assert vp.load_run(tmp_path / "a", headed()).config["rates"] is None
    net, watch = hugging(), WatchTrainer()
    trainer_of(net, tmp_path / "out", trainer_callback("LN1", tmp_path / "b", **ABOUT), watch, optimizer=None, learning_rate=0.02, warmup_steps=0, steps=2).train()
    assert watch.seen[0] == {n: 0.02 for n, _ in net.named_parameters() if "layernorm_before" in n or n.startswith("classifier")}
    assert torch.equal(logits(vp.load_run(tmp_path / "b", hugging()).model), logits(net.eval()))


def test_a_resumed_lightning_training_belongs_upon_its_first_base(tmp_path):
    whole = headed()
    fit(Module(whole), lightning_callback(RATES, tmp_path / "whole"), steps=12)
    keep = L.callbacks.ModelCheckpoint(tmp_path, "part", every_n_train_steps=6)
    fit(Module(headed()), lightning_callback(RATES), keep, steps=6)
    part = str(tmp_path / "part.ckpt")
    fit(Module(headed()), lightning_callback(RATES, tmp_path / "first"), L.callbacks.ModelCheckpoint(tmp_path, "first", every_n_train_steps=6), steps=6)
    net = headed(seed=7)  # as a script has it that leaves the weights to the checkpoint
    fit(Module(net), lightning_callback(RATES, tmp_path / "again"), steps=12, resume=str(tmp_path / "first.ckpt"))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), whole.parameters()))
    assert torch.equal(logits(vp.load_run(tmp_path / "again", headed()).model), logits(whole.eval()))
    net = headed()
    fit(Module(net), lightning_callback(RATES, tmp_path / "late"), steps=12, resume=part)
    assert torch.equal(logits(vp.load_run(tmp_path / "late", headed()).model), logits(whole))
    with pytest.raises(ValueError, match="LN1 is to train at 0.1, and the checkpoint has 0.008"):
        fit(Module(headed()), lightning_callback(RATES | {"LN1": 0.1}, head_lr=8e-3), steps=12, resume=part)


def test_a_resumed_trainer_goes_on_at_its_rates(tmp_path):
    part = str(tmp_path / "b/checkpoint-3")
    trainer_of(hugging(), tmp_path / "b", trainer_callback(RATES), steps=6, save_strategy="steps", save_steps=3).train()
    net, plain, watch = hugging(), hugging(), WatchTrainer()
    trainer_of(net, tmp_path / "b", trainer_callback(RATES, tmp_path / "run", **ABOUT), watch, steps=6).train(resume_from_checkpoint=part)
    check_rates_seen(watch.seen, [0.75, 0.5, 0.25], net)
    trainer_of(plain, tmp_path / "b", steps=6, optimizers=(AdamW(param_groups(plain, RATES)), None)).train(resume_from_checkpoint=part)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters()))
    assert torch.equal(logits(vp.load_run(tmp_path / "run", hugging()).model), logits(plain.eval()))
    with pytest.raises(ValueError, match="LN1 is to train at 0.1, and the checkpoint has 0.008"):
        trainer_of(hugging(), tmp_path / "b", trainer_callback(RATES | {"LN1": 0.1}, head_lr=8e-3), steps=6).train(resume_from_checkpoint=part)


def test_a_saved_delta_is_a_run_like_others(stripes, tmp_path):
    net = headed()
    fit(Module(net), lightning_callback("MHA", tmp_path / "a"))
    run = vp.load_run(tmp_path / "a", headed())
    assert run.predict(stripes.test.images[0].permute(1, 2, 0).numpy())["class"][0] in ("0", "1", "2")
    again = vp.load_run(run.save(tmp_path / "b"), headed())
    assert read_note(tmp_path / "a") == read_note(tmp_path / "b")
    assert again.record() == run.record() and json.dumps(run.record())
    hf = hugging()
    trainer_of(hf, tmp_path / "out", trainer_callback("MHA", tmp_path / "c", **ABOUT), optimizer=None).train()
    back = type(hf).from_pretrained(merge(vp.load_run(tmp_path / "c", hugging()), tmp_path / "whole")).double().eval()
    assert torch.equal(logits(back), logits(hf.eval())) and back.config.id2label[1] == "bee"


def test_what_moved_although_it_was_frozen_is_saved_too(tmp_path):
    class Shift(L.Callback):
        def on_train_end(self, trainer, module):
            with torch.no_grad():
                module.net.blocks[0].mlp.fc1.bias += 1

    net = headed()
    with pytest.warns(UserWarning, match="1 tensors outside of LN1 .* first blocks.0.mlp.fc1.bias: saved too"):
        fit(Module(net), Shift(), lightning_callback("LN1", tmp_path / "a"))
    assert torch.equal(logits(vp.load_run(tmp_path / "a", headed()).model), logits(net.eval()))


def test_two_fits_of_one_callback_belong_upon_the_first_base(tmp_path):
    net, callback = headed(), lightning_callback(RATES, tmp_path / "a", overwrite=True)
    fit(Module(net), callback, steps=2)
    fit(Module(net), callback, steps=2)
    assert torch.equal(logits(vp.load_run(tmp_path / "a", headed()).model), logits(net.eval()))


class Around(Module):
    "A network without a head, and a head beside it."

    def __init__(self, **options):
        super().__init__(tiny_vit(), **options)
        self.top = torch.nn.Linear(12, 3).double()

    def forward(self, x):
        return self.top(self.net(x))


def test_a_head_beside_the_network_trains_at_the_rate_of_the_head_and_is_not_saved(tmp_path):
    module = Around()
    before = copy.deepcopy(module)
    trainer = fit(module, lightning_callback(RATES, head_lr=0.05))
    assert {g["name"]: g["initial_lr"] for g in trainer.optimizers[0].param_groups} == RATES | {"head": 0.05}
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])}
    assert moved == {n for n, _ in module.named_parameters() if n.startswith("top") or by_hand(n.removeprefix("net."))}
    with pytest.raises(ValueError, match="top.weight trains outside of the VisionTransformer and has no place in the folder"):
        fit(Around(), lightning_callback(RATES, tmp_path / "a"))
    module = Around()
    module.top.requires_grad_(False)
    with pytest.raises(ValueError, match="no head of its own"):
        fit(module, lightning_callback(RATES, tmp_path / "a"))


class Two(Module):
    def __init__(self):
        super().__init__(headed())
        self.teacher = headed(1).requires_grad_(False)


def test_one_network_of_several_by_its_name(tmp_path):
    module = Two()
    fit(module, lightning_callback("MHA", tmp_path / "a", network="net"))
    assert torch.equal(logits(vp.load_run(tmp_path / "a", headed()).model), logits(module.net.eval()))
    module = Module(torch.compile(headed(), backend="eager"))
    fit(module, lightning_callback("MHA", tmp_path / "b"))
    assert torch.equal(logits(vp.load_run(tmp_path / "b", headed()).model), logits(module.net._orig_mod.eval()))


def linear():
    return Module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 3).double()))


def with_head(head):
    net = headed()
    net.head = head
    return Module(net)


WRONG = {  # what fails before the first step: module, arguments, options of the Trainer, message
    "nothing matches": (lambda: Module(headed()), ({"MHA@9": 0.1},), {}, r"selection 'MHA@9': .* the model has 2 blocks"),
    "a typo": (lambda: Module(headed()), ("MHS",), {}, "nearest: MHA"),
    "a part of a tensor": (lambda: Module(headed()), ("MHA.v",), {}, "trains a part of blocks.0.attn.qkv.weight"),
    "twice": (lambda: Module(headed()), ({"MHA": 0.1, "all@0": 0.2},), {}, "both train"),
    "no network": (linear, ("MHA",), {}, "this Module holds no network that vitplast knows: expected a Vision Transformer"),
    "two networks": (Two, ("MHA",), {}, "holds 2 networks, net, teacher: expected network='net'"),
    "no such network": (Two, ("MHA", None, "nett"), {}, "network='nett': .*; nearest: net"),
    "a part that is none": (Two, ("MHA", None, "net.blocks"), {}, "Sequential is not covered"),
    "the head alone in the optimizer": (lambda: Module(headed(), optimizer=lambda m: AdamW(m.net.head.parameters())), ("MHA",), {}, "lacks 8 of 8 tensors of 'MHA'"),
    "half precision": (lambda: Module(headed().float()), ("MHA", "run"), {"precision": "bf16-true"}, "was torch.float32 and is torch.bfloat16: expected mixed precision"),
    "a schedule of its own": (lambda: Module(headed(), schedule=lambda o: OneCycleLR(o, 0.1, 9)), (RATES,), {}, "OneCycleLR has rates of its own"),
    "a head without biases": (lambda: with_head(torch.nn.Linear(12, 3, bias=False).double()), ("MHA", "run"), {}, "has the head head.weight: expected one linear layer, head.weight, head.bias"),
    "a deep head": (lambda: with_head(torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Linear(9, 3)).double()), ("MHA", "run"), {}, "has the head head.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_said_before_anything_trains(name, tmp_path):
    make, (selection, *rest), options, message = WRONG[name]
    module = make()
    before = state(module)
    folder = tmp_path / rest[0] if rest and rest[0] else None
    kind = TypeError if "is not covered" in message else ValueError
    with pytest.raises(kind, match=message):
        fit(module, lightning_callback(selection, folder, network=rest[1] if len(rest) > 1 else None), **options)
    assert all(torch.equal(p.to(before[n]), before[n].to(p).to(before[n])) for n, p in module.named_parameters()) and not list(tmp_path.iterdir())


ABOUT_WRONG = {
    "two names": ({"classes": ["a", "b"]}, "2 names, expected 3"),
    "a name twice": ({"classes": ["a", "b", "b"]}, "2 names, expected 3"),
    "a text": ({"classes": "abc"}, "classes='abc': expected a list of 3 names"),
    "one number": ({"mean": 0.5}, "mean=0.5: expected three numbers"),
    "std of zero": ({"std": (0.2, 0, 0.2)}, "std=.* expected three numbers"),
    "crop": ({"crop": 1.5}, "crop=1.5: expected a share"),
}


@pytest.mark.parametrize("name", ABOUT_WRONG)
def test_facts_that_are_none(name, tmp_path):
    options, message = ABOUT_WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        fit(Module(headed()), lightning_callback("MHA", tmp_path / "a", **options))


def test_arguments_that_are_none():
    for make in (lightning_callback, trainer_callback):
        with pytest.raises(ValueError, match="head_lr=0.1 without rates"):
            make("MHA", head_lr=0.1)
        with pytest.raises(ValueError, match="rate -1, expected a positive number"):
            make({"MHA": -1})
        with pytest.raises(ValueError, match="expected one"):
            make({"MHA": 1, "head": 2}, head_lr=0.1)
        with pytest.raises(TypeError, match="clases"):
            make("MHA", clases=["a"])


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds 'a.txt', expected an empty or a new folder"):
        fit(Module(headed()), lightning_callback("MHA", tmp_path))
    with pytest.raises(ValueError, match="holds 'a.txt'"):
        trainer_of(hugging(), tmp_path / "out", trainer_callback("MHA", tmp_path, **ABOUT)).train()
    fit(Module(headed()), lightning_callback("MHA", tmp_path / "run"))
    with pytest.raises(ValueError, match="holds a run already"):
        fit(Module(headed()), lightning_callback("MHA", tmp_path / "run"))
    fit(Module(headed()), lightning_callback("MHA", tmp_path / "run", overwrite=True))
    fit(Module(headed()), lightning_callback("MHA", tmp_path / "tried"), fast_dev_run=True)
    assert not (tmp_path / "tried").exists()


def test_what_the_trainer_must_be_given(tmp_path):
    with pytest.raises(ValueError, match=r"need an optimizer: expected Trainer\(\.\.\., optimizers="):
        trainer_of(hugging(), tmp_path, trainer_callback(RATES), optimizer=None)
    with pytest.raises(ValueError, match=r"does not say how its pictures are normalised: expected mean"):
        trainer_of(hugging(), tmp_path, trainer_callback("MHA", tmp_path / "a"))
    late = trainer_of(hugging(), tmp_path)
    late.add_callback(trainer_callback("MHA"))
    with pytest.raises(ValueError, match="another model than it was made with"):
        late.train()
    made = trainer_of(None, tmp_path, trainer_callback("MHA"), optimizer=None, model_init=hugging)
    with pytest.raises(ValueError, match="another model than it was made with"):
        made.train()
    with pytest.raises(ValueError, match="lacks 10 of 10 tensors of 'MHA'"):
        trainer_of(model := hugging(), tmp_path, trainer_callback("MHA"), optimizers=(AdamW(model.classifier.parameters()), None))


def test_without_the_libraries_a_command_is_said(monkeypatch):
    for make, clear, name, extra in ((lightning_callback, lightning_class, "lightning.pytorch", r"pip install 'vitplast\[lightning\]'"), (trainer_callback, trainer_class, "transformers", r"pip install 'vitplast\[text\]' accelerate")):
        clear.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match=extra):
                make("MHA")
        clear.cache_clear()
