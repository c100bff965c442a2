"""What plasticity is, how large it can be, and what it says about gradients.

`plasticity` measures it between two sets of inputs, `bounds` says what no pair can exceed, `lipschitz` searches for the
worst pair from below, and `gradient_bounds` carries the bounds over to gradients. Every chapter derives what it computes."""

from vitplast._door import door

__all__ = door(
    __name__,
    plasticity="MEASURING_VERSION plasticity",
    norms="norm_bound",
    linear="linear_bound",
    bounds="KINDS_OF_BOUND bounds",
    lipschitz="in_double lipschitz power_iteration norm_of",
    gradients="backward check_labelled gradient_bounds requiring_all",
    steps="FirstStep first_step",
    fast="attended make_plan normalise",
)
