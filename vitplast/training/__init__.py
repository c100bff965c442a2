"""What is trained, how, and what comes out.

`trainable` freezes everything but a selection, `finetune` trains it with a head, `finetune_many` several rates and seeds
at once; `linear_probe` is the zero point. `pretrain` makes the shipped models, and the landscapes look around a training."""

from vitplast._door import door

__all__ = door(
    __name__,
    pretrain_text="TextConfig bits_per_byte pretraining",
    scoring="evaluate",
    updates="fused updated",
    freezing="saved_bytes trainable training_mode weight_digests",
    recipe="FinetuneConfig image_order precision read_update warmup_cosine",
    finetune="Run TRAINING_VERSION decided finetune new_head",
    batched="finetune_many group_key",
    memory="memory_per_run runs_that_fit",
    saving="check_base check_place load_run merge read_note save_run",
    predicting="confusion confusion_of per_class predict",
    probe="PROBE_VERSION fit_head head_inputs head_of linear_probe",
    pretrain="PretrainConfig SIZES hardware pretrain publish",
    landscape="LANDSCAPE_VERSION loss_surface rate_surface",
)
