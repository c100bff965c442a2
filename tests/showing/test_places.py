"""Maps of a network: every number stands in its square, and what is missing is left out."""
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from vitplast.models import KINDS
from vitplast.showing import PlaceExplorer, as_map, place_maps


def test_every_number_is_in_its_square():
    values = pd.Series({f"{kind}@{block}": 10.0 * block + i for block in range(3) for i, kind in enumerate(KINDS) if kind != "LN2"})
    field = as_map(values)
    assert field.shape == (3, 5) and np.isnan(field[:, KINDS.index("LN2")]).all()
    for place, value in values.items():
        kind, _, block = place.partition("@")
        assert field[int(block), KINDS.index(kind)] == value
    figure = place_maps({"a": values, "b": values / 10}, {"b": 1})
    for ax, digits, scale in zip(figure.axes, (0, 1), (1, 10)):
        written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
        assert len(written) == 12 and all(written[i, j] == f"{field[i, j] / scale:.{digits}f}" for i, j in written)
        assert [t.get_text() for t in ax.get_xticklabels()] == list(KINDS)


def test_one_map_with_one_number_alone():
    figure = place_maps({"flat": pd.Series({"MHA@0": 1.0, "FC1@0": 1.0})})
    assert [t.get_text() for t in figure.axes[0].texts] == ["1", "1"]


def test_the_first_of_an_order_is_bright():
    order = pd.Series({"MHA@0": 1.0, "FC1@0": 2.0, "FC2@0": 3.0})
    up, down = place_maps({"number": order, "order": order}, orders=["order"]).axes
    one, other = (ax.images[0].get_array()[0] for ax in (up, down))
    assert one[1] < one[4] and other[1] > other[4]
    assert [t.get_text() for t in up.texts] == [t.get_text() for t in down.texts] == ["1", "2", "3"]


def test_a_page_of_advice_holds_what_it_was_given_and_escapes_it():
    from vitplast.showing import advice_html

    places = pd.DataFrame({"block": [0, 0, 1], "component": ["MHA", "FC1", "MHA"], "criterion": [3.0, 2.0, 1.0]})
    rows = pd.DataFrame({"train": ["MHA", "head"], "rate": ["0.1", "0.3"]})
    page = advice_html("<b> on x", "Train MHA.", rows, places, ["a < b", "c"])
    assert "&lt;b&gt; on x" in page and "a &lt; b" in page and "<b> on x" not in page
    assert page.count("<tr>") == 3 and "0.3" in page and "the 3 components of 2 blocks" in page


def explorer():
    names = [f"{kind}@{block}" for block in range(2) for kind in KINDS]
    frame = pd.DataFrame({"gain": np.arange(10.0), "a </script> number": -np.arange(10.0)}, names)
    frame.loc["LN1@0", "a </script> number"] = np.nan
    return frame, PlaceExplorer({"one": {"t": frame, "u": frame * 2}, "two": {"v": frame.head(5)}})


def test_an_explorer_holds_every_number_and_asks_no_server():
    frame, found = explorer()
    text = found._repr_html_()
    assert "://" not in text and text.count("</script>") == 1 and text.count("<select") == 3
    assert found.data["one"]["u"]["gain"] == {p: 2.0 * i for i, p in enumerate(frame.index)}
    assert set(frame.index) - set(found.data["one"]["t"]["a </script> number"]) == {"LN1@0"}
    with pytest.raises(ValueError, match="one on t: no column 'gain'"):
        PlaceExplorer({"one": {"t": frame[["a </script> number"]]}})


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_an_explorer_draws_both_maps_and_says_a_place(tmp_path):
    "The script in a browser: squares and their ranks, and what a change of the lists and a tap do."
    frame, found = explorer()
    act = """<script>
      const [network, task] = document.querySelectorAll("select");
      task.value = "u"; task.onchange();
      document.querySelector('[data-place="FC1@1"]').onclick();
    </script>"""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{found._repr_html_()}{act}", encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    squares = re.findall(r'data-place="([^"]+)"[^>]*>([^<]+)<', dom)
    assert len(squares) == 19  # one has no number
    assert dict(squares[:10]) == {p: f"{2 * i}" for i, p in enumerate(frame.index)}
    i = list(frame.index).index("FC1@1")
    assert f"FC1 of block 1: gain {2 * i}, place {10 - i} of 10; a &lt;/script&gt; number {-2 * i}, place {i} of 9" in dom
