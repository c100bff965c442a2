"""Which parts of a pretrained Vision Transformer should be finetuned, and why."""

__version__ = "0.1.0"

from vitplast._door import door

__all__ = door(
    __name__,
    models="Component components load",
    theory="bounds lipschitz plasticity",
    data="Task task tasks",
    training="FinetuneConfig Run finetune linear_probe load_run trainable",
    runs="Grid sweep",
    choosing="advise criteria suggest_rates",
)
