"""Small models and tasks that every test can afford."""
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # two workers on two cores; before numpy is loaded

import pytest
import torch
from hypothesis import settings
from timm.models.vision_transformer import VisionTransformer

from vitplast.data import Split, Task

torch.set_num_threads(1)
settings.register_profile("shared", deadline=None)  # no test is about time, and machines are shared
settings.load_profile("shared")
WORST = {}  # component -> largest measured / bound that the tests of the theory have seen
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the tasks of the process that started them
    _cache = tempfile.TemporaryDirectory()  # removed at the end of the session
    os.environ["VITPLAST_CACHE"] = _cache.name


SWEEPS = ("test_sweep.py", "test_study.py", "test_cli.py")  # start processes, and are stopped by the clock


BOOK = ("test_book.py", "test_apparatus.py")  # read the built book


def scope_of(nodeid) -> str:
    "A file's tests stay together and share its fixtures; those that start sweeps are one group, never two at a time."
    file = nodeid.split("::")[0]
    return "sweeps" if file.endswith(SWEEPS) else "book" if file.endswith(BOOK) else file


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    "The folder of the built book."
    out, nbs = tmp_path_factory.mktemp("book"), Path(__file__).resolve().parents[1] / "nbs"
    command = [Path(sys.executable).with_name("jupyter-book"), "build", nbs, "--path-output", out, "--warningiserror", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "_build" / "html"


def pytest_collection_modifyitems(items):
    "The longest group begins first."
    items.sort(key=lambda item: scope_of(item.nodeid) != "sweeps")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "xdist's own groups are not heard by pytest 9.2."
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope_of
    return scheduler


def tiny_vit(seed=0, **kwargs) -> VisionTransformer:
    "A VisionTransformer of two blocks in float64 with random weights everywhere, biases and norms too."
    options = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=0, mlp_ratio=2.0) | kwargs
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer(**options).double().eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def noise(n, seed=0, size=16, channels=3, dtype=torch.float64):
    "n random images."
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pytest_terminal_summary(terminalreporter):
    if WORST:
        terminalreporter.write_line("largest measured / bound: " + ", ".join(f"{k} {v:.6f}" for k, v in sorted(WORST.items())))


@pytest.fixture
def model():
    return tiny_vit()


@pytest.fixture
def stripes():
    "A task of two classes that differ by the brightness of one half: learnt in a few steps."
    def split(n, seed):
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (n,), generator=g)
        images = torch.randint(0, 120, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
        images[labels == 1, :, :, 8:] += 100
        return Split(images, labels)

    return Task("stripes", ("left", "right"), split(64, 0), split(21, 1), split(37, 2), test_sources=37)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    "A numpy warning about NaN or an overflow is a bug that has not been noticed yet."
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "[0-9]+ (groups of images that share none|different images on one side)")  # a few images keep tests short
        yield
