"""The page of weights in a browser: every control by mouse and by keyboard, and exact numbers."""

import re
import shutil

import numpy as np
import pytest

from attn_jax.viz import Shown, viewer

WORDS = ["Tommy", "can", "be", "annoying", "but", "he", "is", "a", "good", "dog"]
GERMAN = ["Tommy", "kann", "lästig", "sein", "</script>"]
PATHS = ("encoder/layers/{}/attention", "decoder/layers/{}/cross")


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def weights_of(seed, heads=3, queries=10, keys=10):
    return softmax(np.random.default_rng(seed).normal(size=(heads, queries, keys)) * 2)


def model(seed):
    shown = {}
    for layer in range(2):
        own, cross = weights_of(seed + layer), weights_of(seed + 9 + layer, keys=len(GERMAN))
        shown[PATHS[0].format(layer)] = Shown(own, WORDS, WORDS)
        shown[PATHS[1].format(layer)] = Shown(cross, WORDS, GERMAN)
    return shown


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed: this test opens the page in it")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Page:
    """A page that is open, what its console said and what it asked of the network."""

    def __init__(self, browser, path):
        self.said, self.requests = [], []
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __getattr__(self, name):
        return getattr(self.page, name)

    @property
    def readout(self):
        return self.inner_text("#readout")

    def captions(self):
        return self.locator("#panes figcaption").all_inner_texts()

    def chosen(self, name):
        return self.eval_on_selector(f"#{name}", "x => x.selectedOptions[0].textContent")

    def hover_cell(self, pane, query, key):
        """The pointer over a cell of a matrix."""
        image = self.locator("#panes svg").nth(pane).locator("image")
        box, one = image.bounding_box(), self.locator("#panes svg").nth(pane)
        rows, columns = (len(WORDS), len(GERMAN if "kann" in one.text_content() else WORDS))
        self.mouse.move(
            box["x"] + (key + 0.5) * box["width"] / columns,
            box["y"] + (query + 0.5) * box["height"] / rows,
        )


@pytest.fixture
def opened(browser, tmp_path):
    path = viewer({"learned": model(0), "gaussian": model(50)}, title="Two <b> models").save(
        tmp_path / "viewer.html"
    )
    page = Page(browser, path)
    yield page
    assert not page.said
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)
    assert [url for url in page.requests if url.startswith("file:")] == [path.as_uri()]
    page.close()


def last_number(text):
    return np.float32(re.findall(r"[-+.\de]+$", text)[0])


@pytest.mark.slow
def test_numbers_under_the_pointer_are_those_given(opened):
    assert opened.title() == "Two <b> models"
    models = [model(0), model(50)]
    opened.check("#difference")
    for query, key in ((0, 0), (3, 7), (9, 9)):
        for pane, one in enumerate(models):
            opened.hover_cell(pane, query, key)
            value = one[PATHS[0].format(0)].weights[0, query, key]
            assert last_number(opened.readout) == value
            assert f"“{WORDS[query]}”, key {key} “{WORDS[key]}”" in opened.readout
        opened.hover_cell(2, query, key)
        first, second = (m[PATHS[0].format(0)].weights[0, query, key] for m in models)
        assert last_number(opened.readout) == np.float32(first - second)
    opened.select_option("#layer", label="1")
    opened.select_option("#head", label="2")
    opened.select_option("#part", label="decoder cross")
    opened.hover_cell(1, 5, 4)
    assert last_number(opened.readout) == models[1][PATHS[1].format(1)].weights[2, 5, 4]
    assert "key 4 “</script>”" in opened.readout


@pytest.mark.slow
def test_every_control_by_keyboard(opened):
    press = opened.keyboard.press
    for key, name, expected in (
        ("h", "head", "1"),
        ("H", "head", "0"),
        ("Shift+H", "head", "2"),
        ("l", "layer", "1"),
        ("L", "layer", "0"),
        ("p", "part", "decoder cross"),
        ("P", "part", "encoder attention"),
        ("v", "view", "lines"),
        ("v", "view", "all layers and heads"),
        ("v", "view", "matrix"),
        ("c", "scale", "0 to 1"),
        ("a", "a", "gaussian"),
        ("b", "b", "none"),
        ("b", "b", "learned"),
    ):
        press(key)
        assert opened.chosen(name) == expected, key
    assert opened.captions() == ["A – gaussian", "B – learned"]
    press("m")
    assert opened.captions()[2] == "A \u2212 B – gaussian \u2212 learned"
    before = opened.evaluate("document.documentElement.dataset.theme")
    press("t")
    assert opened.evaluate("document.documentElement.dataset.theme") != before
    press("?")
    assert opened.is_visible("#help")
    opened.locator("#panes svg").nth(0).focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowRight"):
        press(key)
    value = model(50)[PATHS[0].format(0)].weights[2, 0, 1]
    assert last_number(opened.readout) == value
    opened.locator("#profile svg").focus()
    press("ArrowRight")
    assert opened.readout.startswith("at 0: A gaussian ")


@pytest.mark.slow
def test_views_by_mouse(opened):
    opened.select_option("#view", label="lines")
    opened.locator("#panes svg").nth(0).locator("text", has_text="annoying").nth(0).hover()
    weights = model(0)[PATHS[0].format(0)].weights[0, 3]
    best = int(weights.argmax())
    said = re.search(r"looks at (\d+) “\S+”: ([-.\de]+)", opened.readout)
    assert (int(said[1]), np.float32(said[2])) == (best, weights[best])
    opened.locator("#panes svg").nth(0).focus()
    opened.keyboard.press("ArrowDown")
    assert "query 0 “Tommy” looks at" in opened.readout
    opened.keyboard.press("ArrowRight")
    assert "key 0 “Tommy” is seen by" in opened.readout

    opened.select_option("#view", label="all layers and heads")
    thumbs = opened.locator("#panes svg").nth(0).locator("image.thumb")
    assert thumbs.count() == 6
    thumbs.nth(4).click()
    assert [opened.chosen(n) for n in ("view", "layer", "head")] == ["matrix", "1", "1"]
    opened.keyboard.press("v")
    opened.keyboard.press("v")
    opened.locator("#panes svg").nth(0).focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("Enter")
    assert [opened.chosen(n) for n in ("view", "layer", "head")] == ["matrix", "1", "0"]


@pytest.mark.slow
def test_figures_are_saved_from_the_page(opened, tmp_path):
    for button, kind in (("#svg", "svg"), ("#png", "png")):
        with opened.expect_download() as download:
            opened.click(button)
        name = download.value.suggested_filename
        assert name == f"encoder_attention_layer_0_head_0_matrix.{kind}"
        download.value.save_as(tmp_path / name)
    svg = (tmp_path / "encoder_attention_layer_0_head_0_matrix.svg").read_text()
    assert "var(--" not in svg
    assert svg.count("Tommy") == 4
    assert "Mean weight by relative position" in svg
    png = (tmp_path / "encoder_attention_layer_0_head_0_matrix.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


@pytest.mark.slow
def test_two_thousand_tokens_are_binned_and_painted_soon(browser, tmp_path):
    """First paint below two seconds; a cell is the sum over keys, the mean over queries."""
    weights = weights_of(0, 2, 2000, 2000)
    tokens = [f"t{i}" for i in range(2000)]
    page = Page(
        browser,
        viewer({"long": {"layers/0/attention": Shown(weights, tokens, tokens)}}).save(
            tmp_path / "long.html"
        ),
    )
    paints = page.evaluate("performance.getEntriesByType('paint').map(x => x.startTime)")
    assert 0 < max(paints) < 2000
    assert "a cell is the weight of 4 keys together, in the mean of 4 queries" in page.inner_text(
        "#note"
    )
    page.locator("#panes svg").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert "query tokens 4–7, key tokens 4–7" in page.readout
    assert last_number(page.readout) == pytest.approx(weights[0, 4:8, 4:8].sum(1).mean(), rel=1e-5)
    assert not page.said
    page.close()


@pytest.mark.slow
def test_weights_below_zero_have_colours_of_both_signs(browser, tmp_path):
    """What the normaliser `linear` gives; NaN is grey, and both are told as they are."""
    weights = np.random.default_rng(0).normal(size=(1, 10, 10)).astype(np.float32)
    weights[0, 0, 0] = np.nan
    page = Page(
        browser, viewer({"linear": {"": Shown(weights, WORDS, WORDS)}}).save(tmp_path / "page.html")
    )
    page.hover_cell(0, 2, 3)
    assert last_number(page.readout) == weights[0, 2, 3]
    page.hover_cell(0, 0, 0)
    assert page.readout.endswith("NaN")
    for _ in range(3):
        page.keyboard.press("v")
    assert not page.said
    page.close()


def test_profiles_leave_out_what_no_query_may_see():
    allowed = np.tril(np.ones((1, 3, 3), bool))
    weights = np.where(allowed, 1 / allowed.sum(-1, keepdims=True), 0)
    page = viewer({"m": {"": Shown(weights, "abc", "abc", allowed)}}).page
    profile = re.search(r'"profile": (\{.*?\]\]\})', page)[1]
    assert '"relative": [-2, -1, 0, 1, 2]' in profile
    curve = re.search(r'"weight": \[\[(.*?)\]\]', profile)[1].split(", ")
    assert curve[3:] == ["null", "null"]
    np.testing.assert_allclose([float(x) for x in curve[:3]], [1 / 3, 5 / 12, 11 / 18])


def test_misuse_is_refused_and_a_notebook_shows_the_page():
    with pytest.raises(ValueError, match=r"got \[1, 3, 3\], 2 queries and 3 keys"):
        Shown(np.ones((1, 3, 3)), "ab", "abc")
    with pytest.raises(ValueError, match="needs a model with an attention or more"):
        viewer({})
    frame = viewer({"m": model(0)})._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert "<script>" not in frame
