"""The page of blockffn-inspect --html, as a browser shows it."""

import json
import re

import numpy as np
import pytest

from blockffn_mlx.analysis import page as pages
from blockffn_mlx.analysis.export import Shape
from blockffn_mlx.analysis.page import Page
from blockffn_mlx.analysis.reading import Tokens
from helpers.browser import BROWSER, Browser

NASTY = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "&amp;",
    "\u2028",
    "\n",
]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")
LAYERS, EXPERTS, LENGTH = 3, 10, 40


def filled(title: str = "toy") -> tuple[Page, np.ndarray]:
    """A page of two texts with random scores, and those."""
    rng = np.random.default_rng(3)
    scores = np.maximum(rng.normal(-0.6, 1, (LAYERS, 2 * LENGTH, EXPERTS)), 0).astype(np.float32)
    texts = [f" word{i}" for i in range(2 * LENGTH)]
    texts[5 : 5 + len(NASTY)] = NASTY
    page = Page(title, Shape(2 * LENGTH, [1, 2, 3], EXPERTS))
    for document, start in enumerate((0, LENGTH)):
        for a, b in ((0, 25), (25, LENGTH)):
            at = slice(start + a, start + b)
            nats = np.full(b - a, 1.5, np.float32)
            nats[0] = np.nan if a == 0 else 1.5
            ids = list(range(at.start, at.stop))
            page.add(Tokens(document, f"text {document}", a, ids, texts[at], nats, scores[:, at]))
    return page, scores


def test_the_data_are_what_was_measured():
    page, scores = filled()
    data, active = page.data({}), scores != 0
    assert np.allclose(data["share"], active.mean(axis=1), atol=1e-5)
    halves = active.reshape(LAYERS, -1, 8, EXPERTS).any(axis=2)  # no chunk of 8 crosses the texts
    assert np.allclose(
        data["unions"][data["lengths"].index(8)], halves.mean(axis=(1, 2)), atol=1e-5
    )
    best = np.argsort(-scores[1, :, 4])[:3]
    found = data["strongest"][1][4]["contexts"]
    assert [c[0] for c in found[:3]] == pytest.approx(scores[1, best, 4].tolist(), abs=1e-4)
    assert [c[2] for c in found[:3]] == [page.texts[i] for i in best]
    together = page.together[0, 2] / active[0, :, 2].sum()
    assert np.allclose(together, active[0][active[0, :, 2]].mean(axis=0))


def test_what_a_text_says_is_never_markup():
    page, _ = filled("</title><script>alert(3)</script>")
    text = page.render({"<b>": "<i>"})
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text
    stored = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(stored)["texts"][5:10] == NASTY


def test_long_texts_are_counted_whole_and_shown_in_part(monkeypatch):
    monkeypatch.setattr(pages, "SHOWN", 30)
    page, scores = filled()
    data = page.data({})
    assert len(data["texts"]) == len(data["nats"]) == 30 and data["tokens"] == 2 * LENGTH
    assert data["share"][0][0] == pytest.approx((scores[0, :, 0] != 0).mean(), abs=1e-5)


@needs_browser
def test_clicks_lead_from_map_to_map(tmp_path):
    page, scores = filled()
    file = tmp_path / "page.html"
    file.write_text(page.render({"perplexity": "4.48"}), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.open(file.as_uri())

        def said(selector: str) -> str:
            return browser.ask(f"document.querySelector('{selector}').textContent")

        assert said("#title") == "toy" and "4.48" in said("#tiles")
        assert browser.ask("document.querySelectorAll('#text span:not(.document)').length") == 80
        assert (
            NASTY[0] in said("#text") and browser.ask("document.querySelector('#text img')") is None
        )

        browser.point("#text span:not(.document):nth-of-type(21)", click=False)
        assert "token 19" in said("#tip") and browser.ask("find('tip').style.opacity") == "1"
        browser.point("#text span:not(.document):nth-of-type(21)")
        assert "token 19" in said("#token-facts")
        chips = browser.ask("document.querySelectorAll('#token .row .chip').length")
        assert chips == (scores[:, 19] != 0).sum()

        browser.point("#share", x=(7 + 0.5) / EXPERTS, y=(2 + 0.5) / LAYERS)
        assert said("#expert") == "Expert 7 of layer 3"
        best = scores[2, :, 7].argmax()
        assert browser.ask("document.querySelector('#contexts mark').textContent").strip() == (
            page.texts[best].strip()
        )
        browser.point("#layers button:first-child")
        assert said("#expert") == "Expert 7 of layer 1"
        browser.point("#scores", x=(30 + 0.5) / 80, y=(4 + 0.5) / EXPERTS)
        assert said("#expert") == "Expert 4 of layer 1" and "token 30" in said("#token-facts")
        browser.point("#depth", x=(50 + 0.5) / 80, y=(1 + 0.5) / LAYERS, click=False)
        assert f"{(scores[1, 50] != 0).sum()} of 10 experts" in said("#tip")
        browser.point("#depth", x=(50 + 0.5) / 80, y=(1 + 0.5) / LAYERS)
        assert browser.ask("[chosen.token, chosen.layer]") == [50, 1]
        browser.point("#together", x=0.5, y=(9 + 0.5) / EXPERTS)
        assert said("#expert") == "Expert 9 of layer 2"
        browser.point("#table tbody tr:first-child")
        assert browser.ask("chosen.layer") == 0
        browser.ask("choose({token: 79})")
        scrolled = "['depth', 'scores'].map((id) => find(id).parentElement.scrollLeft)"
        assert len(set(browser.ask(scrolled))) == 1
        browser.point("#tint button:nth-child(2)")
        assert (
            browser.ask("document.querySelector('#tint [aria-pressed=true]').textContent")
            == "surprise"
        )
        shown = browser.ask(
            "getComputedStyle(document.querySelectorAll('#union path.mean')[0]).stroke"
        )
        assert shown and browser.ask("document.querySelectorAll('#union circle').length") == 6
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith("file:")] == []
