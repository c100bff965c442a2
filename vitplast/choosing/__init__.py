"""What to finetune, and at which rate.

`suggest_rates` gives every selection a learning rate without a grid of them."""

from vitplast._door import door

__all__ = door(__name__, rates="step_with_head suggest_rates")
