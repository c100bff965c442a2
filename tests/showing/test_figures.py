"What a figure has to show: ties as ties, names that can be read, one range for what is compared."
import itertools

import numpy as np
import pandas as pd

from vitplast.runs import published_table
from vitplast.showing import THEORY_ORDER, draw_boxes, end_labels, log_y, map_grid, panels


def test_boxes_that_tie_share_their_place():
    rows = published_table()[[*THEORY_ORDER, "all"]].melt(var_name="component", value_name="accuracy")
    _, ax = panels()
    draw_boxes(ax, rows, "accuracy", [*THEORY_ORDER, "all"])
    names = [label.get_text().split("\n")[0] for label in ax.get_xticklabels()]
    at = dict(zip(names, ax.get_xticks()))
    assert at["MHA"] == 1 and np.isclose((at["FC1"] + at["FC2"]) / 2, 2.5) and np.isclose((at["LN2"] + at["LN1"]) / 2, 4.5)
    assert [label.get_text().strip() for label in ax.get_xticklabels(minor=True)] == ["2.5", "4.5"]
    assert sorted(at, key=at.get) == [*THEORY_ORDER, "all"] and np.diff(sorted(at.values())).min() > 0.6  # a box is 0.6 wide


def test_names_at_the_ends_of_lines_do_not_touch():
    figure, ax = panels(height=2.5)
    ends = {"MHA": 1.0, "FC1": 1.01, "FC2": 1.02, "LN2": 2.0, "LN1": 2.0, "all": 9.0}
    for value in ends.values():
        ax.plot([0, 1], [3.0, value])
    log_y(ax)
    end_labels(ax, ends)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert set(boxes) == set(ends)
    for a, b in itertools.combinations(boxes.values(), 2):
        assert a.y1 <= b.y0 or b.y1 <= a.y0
    assert sorted(boxes, key=lambda name: boxes[name].y0)[-1] == "all"
    assert all(float(t.get_text()) > 0 for t in ax.get_yticklabels() if t.get_text())


def test_maps_that_are_compared_have_one_range():
    one = pd.Series({"MHA@0": 1.0, "FC1@0": 2.0, "MHA@1": 3.0})
    figure = map_grid({"native": {"a": one, "b": 2 * one}, "embedding": {"a": -one, "b": one}}, digits=2)
    limits = {ax.images[0].get_clim() for ax in figure.axes}
    assert limits == {(-3.0, 6.0)} and len(figure.axes) == 4
    said = [text.get_text() for text in figure.axes[1].texts]
    assert sorted(said) == ["2.00", "4.00", "6.00"]
