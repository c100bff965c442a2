"""A network, taken apart.

The only room that knows an architecture's attribute names. `load` gives a model by name or from a file, `anatomy` and
`components` say which modules are its norms, its attention and its linear layers, whatever library it comes from, and
`prepare` turns pictures into what it was pretrained on. An architecture is added as one function in one file."""

from vitplast._door import door

__all__ = door(
    __name__,
    layers="Attention Linear Norm evaluating",
    components=(
        "Anatomy Component INPUTS KINDS adapter_of anatomy check_sequences components first fit forward_mode "
        "unwrapped visit visit_tokens watching"
    ),
    selection="CHOICES Selection block_prefix check_bare chosen_places needs_model read_selection",
    rescaling="MOVES SCALINGS normal_form rescale",
    focus="FOCUS SHA256 check_focus_size",
    checkpoints="EXTENSION FILES convert model_source on_hub",
    language="GPTConfig single_tensors",
    loading=(
        "HEADER SHIPPED ViTConfig build card check_model load named_models prepare read save shipped "
        "skeleton twin_name untrained with_file"
    ),
)
