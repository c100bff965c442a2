"""Many runs, kept.

A `Grid` says which runs a comparison consists of, `sweep` computes those that its `Store` does not hold, on this machine or
many, and the statistics turn the frame of runs into statements with intervals. `check` holds a store against the paper."""

from vitplast._door import door

__all__ = door(
    __name__,
    store="Store as_line",
    grid=(
        "FURTHER Grid RunConfig model_contents task_contents"
    ),
    presets="PRESETS all_runs read_grids several with_weights",
    executors="EXECUTORS choose cores materials one_thread versions",
    sweep=(
        "curve_frame extended_arms other_versions probe_frame run_frame stored_runs "
        "sweep"
    ),
    arms="GPU",
    estimates="arithmetic in_words seconds_left size_of",
    check="PUBLISHED_SEEDS check check_text published_results published_table welch",
    stats=(
        "SELECTIONS accuracy_table best_rates chosen compare corrected friedman "
        "on_edge rank_correlation rate_gaps relative_gain summarise t_interval"
    ),
)
