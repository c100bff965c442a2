"""Which parts of a pretrained Vision Transformer should be finetuned, and why."""

__version__ = "0.1.0"

# Some functions bear the name of their module (vitplast.plasticity): imported here, the function is what `vp.plasticity` means.
from vitplast.bounds import bounds
from vitplast.components import Component, components
from vitplast.data import Task
from vitplast.finetune import FinetuneConfig, Run, finetune
from vitplast.freezing import trainable
from vitplast.grid import Grid
from vitplast.lipschitz import lipschitz
from vitplast.models import load
from vitplast.plasticity import plasticity
from vitplast.probe import linear_probe
from vitplast.sweep import sweep
from vitplast.tasks import task, tasks

__all__ = [
    "Component", "FinetuneConfig", "Grid", "Run", "Task",
    "bounds", "components", "finetune", "linear_probe", "lipschitz", "load", "plasticity", "sweep", "task", "tasks", "trainable",
]  # fmt: skip
