"""What to finetune, and at which rate.

`criteria` gives every component of every block 31 numbers that could rank them, `suggest_rates` gives
every selection a learning rate without a grid; `lightning_callback` and `trainer_callback` take both into a training loop of others."""

from vitplast._door import door

__all__ = door(
    __name__,
    criteria="CRITERIA FAMILIES criteria",
    judging=(
        "chance correlation gains kinds_of lost_by mean_interval partial_correlation regrets "
        "score_table scores short_runs standing stored_criteria stored_plasticity "
        "stored_test_set together"
    ),
    budget="budgeted greedy place_sizes",
    advice="Advice advise answer_of display_advice read_advice",
    export=(
        "as_regex param_groups peft_config trained_names trainer_code unfrozen_yaml"
    ),
    regroup="set_rates",
    callbacks="lightning_callback trainer_callback",
    rates="step_with_head suggest_rates",
)
