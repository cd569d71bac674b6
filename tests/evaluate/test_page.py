"""The page of what was measured: whole in one file, and harmless whatever captions say."""

import base64
import re
from html.parser import HTMLParser

import numpy as np

from dalle2_jax.evaluate import page
from dalle2_jax.runtime import grid

EVIL = "<script>alert('x')</script> & \"quoted\""


def entry(value, interval, **more):
    common = dict(n=80, features="CLIP", what="what it is", reference=EVIL, n_reference=60)
    return dict(value=value, interval=interval, standard_error=None) | common | more


class Checked(HTMLParser):
    """Every tag closed, none of those that load or run something."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes:
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith("data:image/png;base64,")
        if tag not in ("meta", "img", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_is_one_harmless_file(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    grid.save_png(tmp_path / "samples_images.png", image)
    results = {
        "clip_frechet": entry(0.123456, [0.1, 0.2]),
        "clip_precision": entry(0.75, [0.6, 0.9], share=True),
        "clip_density": entry(1.5, None),
    }
    page.write(
        tmp_path / "out.html",
        EVIL,
        page.entries(results),
        EVIL,
        [tmp_path / "samples_images.png"],
        {"caption": EVIL},
    )
    text = (tmp_path / "out.html").read_text()
    parser = Checked()
    parser.feed(text)
    assert not parser.open and parser.text.count(EVIL) >= 4
    assert "0.1235" in parser.text and "0.1 .. 0.2" in parser.text
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == (tmp_path / "samples_images.png").read_bytes()


def test_intervals_are_drawn_where_they_are():
    """A share of 0.5 with the interval (0.25, 1) in a plot of 420 from 220 on."""
    drawn = page.intervals({"recall": (0.5, (0.25, 1.0))})
    assert 'cx="430.0"' in drawn and "M325.0 12.0H640.0" in drawn
