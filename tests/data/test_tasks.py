"""Names become tasks, and what is no task is refused with the nearest that is."""
from pathlib import Path

import pytest
import torch

import vitplast as vp
from vitplast.data import SUITES, pretraining_images
from vitplast.runs import published_results


def test_the_suites_correspond():
    assert {s: len(names) for s, names in SUITES.items()} == {"offline": 11, "real": 5, "dense": 2, "paper": 11, "text": 4}
    published = published_results().task
    assert set(SUITES["paper"]) == set(published)


def test_tasks_of_a_suite_in_its_order():
    suite = vp.tasks("offline")
    assert tuple(t.name for t in suite) == SUITES["offline"] and all(isinstance(t, vp.Task) for t in suite)
    with pytest.raises(ValueError, match="unknown suite 'ofline': expected one of .'offline', 'real', 'dense', 'text', 'paper'."):
        vp.tasks("ofline")


@pytest.mark.parametrize("name, message", [
    ("digts", "unknown task 'digts'.*nearest known: .'digits'"),
    ("cifar11", "unknown task 'cifar11'.*nearest known: .'cifar10"),
    ("digits_c/snw@5", "unknown task 'digits_c/snw@5'.*nearest known: .'digits_c/snow@5'"),
    ("domainnet/skech", "nearest known: .'domainnet/sketch'"),
    ("digits_c/snow@6", "severity '6', expected an integer from 1 to 5"),
    ("cifar10_c/snow@0", "severity '0', expected an integer from 1 to 5"),
    ("pet@5", "unknown task 'pet@5'"),
    ("digits_c/snow", "unknown task 'digits_c/snow'.*nearest known: .'digits_c/snow@5'"),
])  # fmt: skip
def test_names_that_are_no_task(name, message):
    with pytest.raises(ValueError, match=message):
        vp.task(name)


def test_options_that_a_drawn_task_does_not_have():
    with pytest.raises(TypeError, match=r"task 'digits' takes no \['download'\]"):
        vp.task("digits", download=True)


@pytest.mark.parametrize("size", [0, -1, 32.5, "32"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=f"size={size!r}: expected a positive integer"):
        vp.task("digits", size=size)


def test_a_path_is_a_folder_even_if_a_task_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(ValueError, match="digits: 0 class folders"):
        vp.task(Path("digits"))
    with pytest.raises(TypeError, match=r"task '.*digits' takes no \['download'\]: expected some of \['augment', 'crop', 'max_pixels'"):
        vp.task(Path("digits"), download=True)
    with pytest.raises(TypeError, match=r"task 'pet' takes no \['roott'\]: expected some of \['root'"):
        vp.task("pet", roott="x")


def test_pretraining_images_are_the_same_every_time():
    a = pretraining_images(300)
    assert torch.equal(a[:256], pretraining_images(256)) and a.dtype == torch.uint8 and not torch.equal(a, pretraining_images(300, seed=2))
