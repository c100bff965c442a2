"""Pictures, and what is asked about them.

`task` gives a classification task by name or from a folder of class folders, `tasks` a whole suite; pictures are drawn by
formulas or read from files, split without leaks and decoded once. `measure` holds two names of pictures against each other."""

from vitplast._door import door

__all__ = door(
    __name__,
    formula="FormulaConfig FormulaImages",
    splits="Split Task agreement check_one_label",
    reading="Files PICTURES_VERSION RandomCrops decode",
    folders="below find_pictures folder_contents is_image",
    corruptions="CORRUPTIONS corrupt",
    offline="OFFLINE",
    real="REAL photographs",
    published="PAPER PUBLISHED_NORMALISATION",
    text="TEXT byte_task library_text next_bytes text_contents text_task",
    tasks="SUITES crop_of known_as pretraining_images suite_of task task_for tasks",
    measuring="DISTRIBUTIONS FORMULA PHOTOGRAPHS measure measured named_images",
)
