"""A stopped training goes on to the same bits: every optimizer, random numbers, parts of tensors; another one's state is refused."""
import copy
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from safetensors.torch import load_file

import vitplast as vp
from vitplast.data import RandomCrops, Split, Task


class Stopped(Exception):
    "As a killed process: nothing is tidied up."


def stopping(task, n):
    "The task, whose n-th batch raises."
    left = iter(range(n))

    class Stopping(Task):
        def batch(self, *args):
            if next(left, None) is None:
                raise Stopped
            return super().batch(*args)

    return Stopping(*(getattr(task, f.name) for f in fields(task)))


def with_dropout():
    return tiny_vit(num_classes=3, proj_drop_rate=0.3)


def augmented(stripes):
    "Squeezed training pictures of 20 pixels, of which crops of 16 are cut."
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 255, (len(stripes.train), 3, 20, 20), generator=g, dtype=torch.uint8)
    crops = RandomCrops(16, torch.ones(len(stripes.train)))
    return Task("crops", stripes.classes, Split(images, stripes.train.labels), stripes.validation, stripes.test, stripes.test_sources, crops)


@pytest.mark.parametrize("changes, what, build, prepared", [
    ({}, "all", tiny_vit, None),
    ({"optimizer": "adamw", "weight_decay": 0.1}, "all", tiny_vit, None),
    ({"weight_decay": 0.1}, "MHA.v+LN1@0", tiny_vit, None),
    ({}, "LN1", with_dropout, None),
    ({}, "MHA@0+LN1", tiny_vit, augmented),
    ({"momentum": 0.0, "class_weights": True, "patience": 3}, "FC1@0+LN1@0", tiny_vit, None),
    ({"head_lr": 0, "final_norm": True}, "LN1", tiny_vit, None),
])
@pytest.mark.parametrize("after", [3, 4, 9, 11])
def test_a_stopped_training_ends_in_the_same_bits(stripes, tmp_path, changes, what, build, prepared, after):
    task = prepared(stripes) if prepared else stripes
    config = vp.FinetuneConfig(**{"steps": 12, "eval_every": 4, "batch_size": 8, "lr": 0.05} | changes)
    model = build() if build is with_dropout else build(num_classes=3)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    whole, file = vp.finetune(model, task, what, config), tmp_path / "state"
    with pytest.raises(Stopped):
        vp.finetune(model, stopping(task, after), what, config, unfinished=file)
    assert file.exists() == (after >= 4)
    torch.manual_seed(99)  # another process
    again = vp.finetune(model, task, what, config, unfinished=file)
    assert again.history.equals(whole.history) and again.best_step == whole.best_step
    assert (again.test_accuracy, again.validation_accuracy) == (whole.test_accuracy, whole.validation_accuracy)
    assert all(torch.equal(p, q) for p, q in zip(again.model.state_dict().values(), whole.model.state_dict().values()))
    assert not file.exists()


def stopped(stripes, file, model=None, **changes):
    config = vp.FinetuneConfig(**{"steps": 8, "eval_every": 2, "batch_size": 8} | changes)
    with pytest.raises(Stopped):
        vp.finetune(model or tiny_vit(num_classes=3), stopping(stripes, 5), "LN1", config, unfinished=file)
    return config


def test_the_state_of_another_training_is_refused(stripes, tmp_path):
    config = stopped(stripes, file := tmp_path / "state")
    moved = copy.deepcopy(tiny_vit(num_classes=3))
    with torch.no_grad():
        moved.blocks[0].norm1.weight[0] += 1e-9
    frozen = copy.deepcopy(tiny_vit(num_classes=3))
    with torch.no_grad():
        frozen.blocks[0].mlp.fc1.weight[0] *= 3
    images, labels = stripes.train
    turned = Split(255 - images, labels)
    others = [
        (tiny_vit(num_classes=3), stripes, "LN1", vp.FinetuneConfig(steps=8, eval_every=2, batch_size=8, lr=0.5)),
        (tiny_vit(num_classes=3), stripes, "LN2", config),
        (moved, stripes, "LN1", config),
        (frozen, stripes, "LN1", config),
        (tiny_vit(num_classes=3), replace(stripes, train=turned), "LN1", config),
        (tiny_vit(num_classes=3), replace(stripes, validation=Split(255 - stripes.validation.images, stripes.validation.labels)), "LN1", config),
        (tiny_vit(num_classes=3), replace(stripes, augment=lambda images, rows, g: images), "LN1", config),
    ]
    for other in others:
        with pytest.raises(ValueError, match="belongs to another training"):
            vp.finetune(*other, unfinished=file)
    before = file.read_bytes()
    file.write_bytes(before[:-5])
    with pytest.raises(ValueError, match="not the state of a training"):
        vp.finetune(tiny_vit(num_classes=3), stripes, "LN1", config, unfinished=file)
    file.write_bytes(before)
    vp.finetune(tiny_vit(num_classes=3), stripes, "LN1", config, unfinished=file)


def test_a_training_that_had_finished_its_steps_only_reads_the_test_pictures(stripes, tmp_path, monkeypatch):
    from vitplast.training.resuming import Unfinished

    config, file = vp.FinetuneConfig(steps=4, eval_every=2, batch_size=8), tmp_path / "state"
    whole = vp.finetune(tiny_vit(num_classes=3), stripes, "LN1", config)
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "remove", lambda self: None)
        vp.finetune(tiny_vit(num_classes=3), stripes, "LN1", config, unfinished=file)
    again = vp.finetune(tiny_vit(num_classes=3), stopping(stripes, 0), "LN1", config, unfinished=file)
    np.testing.assert_array_equal(again.history, whole.history)
    assert again.test_accuracy == whole.test_accuracy


@pytest.mark.parametrize("began", [True, False])
def test_the_precision_is_that_of_the_beginning(stripes, tmp_path, monkeypatch, began):
    module, file = sys.modules["vitplast.training.finetune"], tmp_path / "state"
    config = vp.FinetuneConfig(steps=8, eval_every=2, batch_size=8, bf16="auto")
    model = tiny_vit(num_classes=3).float()
    monkeypatch.setattr(module, "decided", lambda m, c: replace(c, bf16=began))
    whole = vp.finetune(model, stripes, "LN1", config)
    with pytest.raises(Stopped):
        vp.finetune(model, stopping(stripes, 5), "LN1", config, unfinished=file)
    monkeypatch.setattr(module, "decided", lambda m, c: replace(c, bf16=not began))
    again = vp.finetune(model, stripes, "LN1", config, unfinished=file)
    assert again.bf16 == began and again.history.equals(whole.history)


def test_the_state_stays_where_the_caller_keeps_it_until_the_run_is_saved(stripes, tmp_path):
    config, file = vp.FinetuneConfig(steps=4, eval_every=2, batch_size=8), tmp_path / "state"
    whole = vp.finetune(tiny_vit(num_classes=3), stripes, "LN1", config, unfinished=file, keep_unfinished=True)
    assert file.exists()
    again = vp.finetune(tiny_vit(num_classes=3), stopping(stripes, 0), "LN1", config, unfinished=file)
    assert again.history.equals(whole.history) and not file.exists()


def test_weights_of_other_strides_are_written(tmp_path):
    from vitplast.training.resuming import write_tensors

    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    write_tensors(tmp_path / "state", {"last": x.to(memory_format=torch.channels_last), "turned": x.mT})
    found = load_file(tmp_path / "state")
    assert torch.equal(found["last"], x) and torch.equal(found["turned"], x.mT)


def test_a_disk_without_room_is_an_oserror_and_what_was_there_stays(tmp_path):
    import resource

    from vitplast.training.resuming import write_tensors

    file, limits = tmp_path / "state", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors(file, {"a": torch.ones(3)})
    before = file.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the kernel refuses, as for a full disk
    try:
        with pytest.raises(OSError, match="state: cannot be written"):
            write_tensors(file, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state"]
