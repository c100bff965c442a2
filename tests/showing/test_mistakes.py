"""The page of mistakes: the surest first, at most 24 small pictures, names escaped, whatever is known about the pictures."""
import base64
import io
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from browser import Browser
from PIL import Image

from vitplast.showing import mistaken_pairs, mistakes, predictions_html

NAMES = ("cat", "dog & <b>", 'a "long" name of a class that does not fit into one line of a phone', "owl")


def predicted(n, classes=NAMES, seed=0):
    "A frame as run.predict gives it, of invented pictures, and noise as pictures."
    draw = np.random.default_rng(seed)
    label, given = (draw.integers(0, len(classes), n) for _ in range(2))
    files = [f"photos/{classes[i]}/<{k}>.png" for k, i in enumerate(label)]
    columns = {"file": files, "class": [classes[i] for i in given], "probability": draw.uniform(0.3, 1, n), "label": [classes[i] for i in label]}
    noise = [draw.integers(0, 255, (120, 100, 3), dtype=np.uint8) for _ in range(n)]
    return pd.DataFrame(columns), noise


def run_of(classes=NAMES, crop=1.0):
    return SimpleNamespace(classes=classes, crop=crop)


def test_mistakes_and_pairs_counted_by_hand():
    frame = pd.DataFrame({
        "class": ["a", "b", "b", "a", "b", "a"],
        "label": ["a", "a", "a", "b", "b", None],
        "probability": [0.9, 0.6, 0.8, 0.7, 0.99, 0.95],
    })
    assert mistakes(frame).index.tolist() == [2, 3, 1]
    assert mistaken_pairs(frame).to_dict("records") == [{"label": "a", "class": "b", "pictures": 2}, {"label": "b", "class": "a", "pictures": 1}]


def test_what_the_page_says_and_shows():
    frame, noise = predicted(400)
    page = predictions_html("<i> & co", run_of(), frame, noise)
    right = sum(a == b for a, b in zip(frame["label"], frame["class"]))
    assert f"{right / 400:.1%} of 400 pictures right, {400 - right} wrong." in page
    wrong = frame[frame["label"] != frame["class"]].sort_values("probability", ascending=False)
    alts = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="called ([^"]*)">', page)
    assert len(alts) == 24 == page.count("<img")
    for alt, row in zip(alts, wrong.head(12).itertuples()):
        assert f"({row.probability:.1%})" in alt and f"&lt;{row.Index}&gt;.png" in alt
    assert "<i>" not in page and "<b>." not in page.replace("<p><b>", "") and "dog &amp; &lt;b&gt;" in page and "dog & <b>" not in page
    assert len(page) < 1.2e6  # of noise, the largest pictures that there are
    assert "<script" not in page and "http" not in page
    for label in NAMES:  # the table of pairs holds every count
        for given in NAMES:
            n = int(((frame["label"] == label) & (frame["class"] == given)).sum())
            assert f">{n}</td>" in page


def test_a_picture_is_the_centre_square_that_the_network_saw():
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[50:150, 150:250] = 255  # half of the centre square
    frame = pd.DataFrame({"file": ["0"], "class": ["cat"], "probability": [0.5]})
    page = predictions_html("one", run_of(crop=0.5), frame, [pixels])
    url = re.search(r"base64,([^\"]+)", page)[1]
    image = np.array(Image.open(io.BytesIO(base64.b64decode(url))))
    assert image.shape == (96, 96, 3) and (image[1:-1, 1:-1] > 250).all()


def test_pictures_of_no_known_class_and_pictures_without_mistakes():
    frame, noise = predicted(60)
    page = predictions_html("x", run_of(), frame.drop(columns="label"), noise)
    assert "what they are is not known" in page and "Least sure" in page and "Surest mistakes" not in page and page.count("<img") == 24
    least = frame.probability.nsmallest(24).index
    assert re.findall(r'&lt;(\d+)&gt;.png">', page) == [str(i) for i in least]
    page = predictions_html("x", run_of(), frame.assign(label=frame["class"]), noise)
    assert "100.0% of 60 pictures right, 0 wrong" in page and "Least sure" in page
    loose = frame.assign(label=[None, *frame["label"][1:]])
    page = predictions_html("x", run_of(), loose, noise)
    assert "of 59 pictures right" in page and "1 more have no label" in page


def test_many_classes_stay_a_page():
    classes = tuple(f"class {i}" for i in range(300))
    frame, noise = predicted(900, classes)
    page = predictions_html("x", run_of(classes), frame, noise)
    assert page.count("<tr>") == 51 and "classes of higher recall are left out" in page and "Which is taken for which" not in page
    assert len(page) < 1.2e6


def test_what_is_refused():
    frame, noise = predicted(5)
    with pytest.raises(ValueError, match="4 pictures, 5 predictions"):
        predictions_html("x", run_of(), frame, noise[1:])
    with pytest.raises(ValueError, match="is none of 'cat'"):
        predictions_html("x", run_of(("cat",)), frame, noise)
    with pytest.raises(ValueError, match="not a readable image"):
        predictions_html("x", run_of(), frame)  # files that are not there


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_the_page_fits_a_screen_and_a_phone_and_asks_for_nothing(tmp_path):
    frame, noise = predicted(100)
    (tmp_path / "a.html").write_text(predictions_html("A title/with/a/path/that_is_rather_long_for_a_phone_and_has_no_space_in_it", run_of(), frame, noise))
    with Browser() as browser:
        for shown, width in zip(browser.open((tmp_path / "a.html").as_uri(), (1300, 390)), (1300, 390)):
            assert shown["wide"] <= width and shown["complaints"] == []
