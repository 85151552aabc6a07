"""The heat map in a browser: its numbers are those of the reading, and everything on it works."""

import math

import numpy as np
import pytest
import torch
from browser import opened

from refinelens.lens.translators import Translators
from refinelens.pages.heatmap import HeatMap, LensMap, Segment, visible
from refinelens.pages.html import SCRIPTS, write_page

TEXT = "The password of Alena Ashbury is acorn.\nWhat is the password of Alena Ashbury?\nAnswer:"
SCRIPT = "<script>alert(1)</script>"
HOSTILE = [SCRIPT, "</script><img src=x onerror=alert(2)>", "<!--", "&lt;b&gt;", "\u2028'\"`", "${alert(3)}"]
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def reading(lens):
    return lens.read(TEXT, targets="acorn", top_k=10)


@pytest.fixture(scope="module")
def path(reading, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "map.html"
    path.write_text(reading.to_html(), encoding="utf-8")
    return path


def cell(page, layer, place, n_layers):
    return page.locator(f"#c{place}-{n_layers - layer}")


def test_cells_are_those_of_the_reading(chromium, path, reading):
    n_layers = len(reading) - 1
    with opened(chromium, path, width=2200) as page:
        for layer in range(n_layers + 1):
            for place in range(reading.shape[1]):
                text, rank = reading.text(int(reading.argmax[layer, place])), int(reading.rank[layer, place]) + 1
                shown = visible(text) + ("" if rank == 1 else str(rank))
                assert cell(page, layer, place, n_layers).text_content() == shown


def test_hover_shows_the_numbers_of_a_cell(chromium, path, reading):
    n_layers, layer, place = len(reading) - 1, 2, 12
    with opened(chromium, path, width=2200) as page:
        cell(page, layer, place, n_layers).hover()
        shown = page.locator(".detail .numbers").inner_text()
        assert f"rank {int(reading.rank[layer, place]) + 1:,}" in shown
        assert f"{float(reading.entropy[layer, place]):.3f} nats" in shown
        assert f"{float(reading.kl[layer, place]):.3f} nats" in shown
        rows = page.locator(".likeliest tr")
        assert rows.count() == 10
        texts = [row.locator("td").first.text_content() for row in rows.all()]
        assert [text.strip('"') for text in texts] == [reading.text(int(id)) for id in reading.top_ids[layer, place]]
        best = math.exp(float(reading.top_logprobs[layer, place, 0]))
        percent = float(rows.first.locator(".number").text_content().removesuffix(" %"))
        assert percent == pytest.approx(100 * best, rel=0.02, abs=0.5)


def test_marks_are_first_correct_and_settle(chromium, path, reading):
    import refinelens

    found = refinelens.trajectories(reading.rank)
    n_layers = len(reading) - 1
    with opened(chromium, path, width=2200) as page:
        for place in range(reading.shape[1]):
            for name, layers in (("first", found.first_correct), ("settle", found.settle)):
                marked = page.locator(f".cell.{name}[data-column='{place}']")
                assert marked.count() == (layers[place] >= 0)
                if layers[place] >= 0:
                    assert int(marked.get_attribute("data-row")) == n_layers - layers[place]


def test_keyboard_alone_does_everything(chromium, path, reading):
    with opened(chromium, path, width=900) as page:
        page.focus(".map")
        here = page.locator(".cell.here")
        last = reading.shape[1] - 1
        assert (here.get_attribute("data-column"), here.get_attribute("data-row")) == (str(last), "0")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowDown")
        assert (here.get_attribute("data-column"), here.get_attribute("data-row")) == (str(last - 1), "1")
        page.keyboard.press("Home")
        assert here.get_attribute("data-column") == "0" and here.is_visible()
        page.keyboard.press("Enter")
        assert page.locator(".pins button").count() == 1
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        assert page.locator(".pins button").count() == 2 and page.locator("path.exact").count() == 2
        page.keyboard.press("Escape")
        assert page.locator(".pins button").count() == 0
        measure = page.locator(".bar select").nth(1)
        before = measure.input_value()
        page.keyboard.press("m")
        assert measure.input_value() != before
        page.keyboard.press("t")
        assert page.evaluate("document.documentElement.dataset.theme") in ("dark", "light")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"


def test_a_pin_draws_the_exact_ranks(chromium, path, reading):
    n_layers, place = len(reading) - 1, 5
    with opened(chromium, path, width=2200) as page:
        cell(page, n_layers, place, n_layers).click()
        assert page.locator(".pins button").count() == 1
        drawn = page.locator("path.exact").get_attribute("d")
        heights = [float(step.split("h")[0].split(" ")[1]) for step in drawn.replace("L", "M").split("M")[1:]]
        most = math.log10(reading.vocab_size)
        wanted = [10 + math.log10(int(rank) + 1) / most * 164 for rank in reading.rank[:, place]]
        assert len(heights) == n_layers + 1 and np.allclose(heights, wanted, atol=1.5)
        page.locator(".pins button").click()
        assert page.locator(".pins button").count() == 0


def test_layers_and_measures_switch(chromium, path, reading):
    with opened(chromium, path, width=2200) as page:
        page.select_option(".bar select >> nth=2", "4")
        assert page.locator(".cell[data-column='0']").count() == 3  # output, 4, 0
        page.select_option(".bar select >> nth=2", "1")
        for measure in ("probability", "rank", "entropy", "kl", "agreement"):
            page.select_option(".bar select >> nth=1", measure)
            values = page.eval_on_selector_all(".cell", "all => all.map(c => +c.style.getPropertyValue('--v'))")
            assert 0 <= min(values) and max(values) <= 1 and len(set(values)) > 1
        output = page.eval_on_selector_all(".cell.output", "all => all.map(c => c.style.getPropertyValue('--v'))")
        assert set(output) == {"1.000"}


def test_search_finds_tokens(chromium, path, reading):
    with opened(chromium, path) as page:
        page.fill("#search", "alena")
        hits = page.locator("#found").text_content()
        has = [
            "alena" in reading.text(int(id)).lower() or any("alena" in reading.text(int(b)).lower() for b in column)
            for id, column in zip(reading.tokens.input_ids[0], reading.argmax.T, strict=True)
        ]
        assert hits == f"{sum(has)} columns"
        page.keyboard.press("Enter")
        assert page.locator(".cell.here").get_attribute("data-column") == str(has.index(True))


def test_lenses_switch(chromium, lens, tmp_path):
    ids = torch.tensor([lens.tokenizer(TEXT)["input_ids"]])
    hidden = lens.hidden(ids, torch.arange(ids.shape[1]))[:, 0]
    d_model = hidden.shape[-1]
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(lens.n_layers, d_model, d_model, generator=generator)
    other = lens.with_lens(Translators(weight, torch.zeros(lens.n_layers, d_model)))
    from dataclasses import replace

    from refinelens.lens.reading import heat_map

    both = [one.read_states(hidden, top_k=3) for one in (lens, other)]
    path = tmp_path / "two.html"
    path.write_text(heat_map([both[0], replace(both[1], lens="own")]).to_html(), encoding="utf-8")
    with opened(chromium, path, width=2200) as page:
        for number, one in ((0, both[0]), (1, both[1])):
            page.select_option(".bar select >> nth=0", str(number))
            shown = page.locator("#c3-5").evaluate("cell => cell.firstChild.textContent")
            assert shown == visible(one.text(int(one.argmax[lens.n_layers - 5, 3])))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_are_readable(chromium, path, scheme):
    """Text stands out from its ground by 4.5 or more (WCAG 2, AA), in all cells in view."""
    code = """() => [...document.querySelectorAll('.cell')].map(c => {
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const light = colour => {
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const style = getComputedStyle(c), [a, b] = [light(style.color), light(style.backgroundColor)];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    })"""
    with opened(chromium, path, color_scheme=scheme) as page:
        assert min(page.evaluate(code)) >= 4.5


def small_map(texts, title="a map", segments=()):
    n = len(texts)
    argmax = np.tile(np.arange(n), (3, 1))
    flat = np.full((3, n), -0.5, np.float32)
    lens = LensMap("plain", argmax, flat, -flat, -flat, argmax * 0, flat, argmax[..., None], flat[..., None])
    places = list(range(n))
    return HeatMap(title, places, dict(enumerate(texts)), [lens], n, places, places, "x", 1, list(segments))


def test_texts_of_strangers_stay_texts(chromium, tmp_path):
    page_text = small_map(HOSTILE, SCRIPT, [Segment(0, 2, SCRIPT, "document")]).to_html()
    path = tmp_path / "hostile.html"
    path.write_text(page_text, encoding="utf-8")
    with opened(chromium, path) as page:
        assert page.locator("h1").text_content() == SCRIPT
        for place, text in enumerate(HOSTILE):
            assert page.locator(f"#c{place}-0").text_content() == text, "nothing but the text"
        assert page.locator("main script, main img").count() == 0
        assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_it_prints_all_columns_in_bands_on_white(chromium, path, reading):
    n = reading.shape[1]
    with opened(chromium, path, color_scheme="dark") as page:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator(".map").is_visible() and not page.locator(".bar").first.is_visible()
        columns = page.locator(".band .column").all()
        assert len(columns) == n
        for place, column in enumerate(columns):
            best = [reading.text(int(id)) for id in reading.argmax[:, place].flip(0)]
            shown = column.locator(".cell").evaluate_all("cells => cells.map(cell => cell.firstChild.textContent)")
            assert shown == [visible(text) for text in best]
        right = [column.bounding_box()["x"] + column.bounding_box()["width"] for column in columns]
        assert max(right) <= 1047 + page.locator(".band").first.bounding_box()["x"]  # of A4 on its side, less margins
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator(".band").count() == 0


def test_mere_spaces_are_seen():
    assert [visible(text) for text in ("  ", " a", "", "\n", "\t\r")] == ["␣␣", " a", "∅", "⏎", "⇥␍"]


def test_a_phone_has_everything(chromium, path):
    with opened(chromium, path, width=390, height=800) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator(".map").is_visible() and page.locator(".detail").is_visible()


def test_a_thousand_tokens_are_small_and_smooth(chromium, tmp_path):
    rng = np.random.default_rng(0)
    shape, k, vocab_size = (33, 1000), 10, 5000
    top = np.sort(rng.integers(0, vocab_size, (*shape, k)))
    logprobs = -np.sort(rng.gamma(2, 2, (*shape, k))).astype(np.float32)
    rank = np.floor(10 ** rng.uniform(0, 3.6, shape)).astype(np.int64)
    nats = rng.gamma(2, 2, shape).astype(np.float32)
    lens = LensMap("plain", top[..., 0], logprobs[..., 0], nats, nats, rank, logprobs[..., 0], top, logprobs)
    texts = {id: f" token{id}" for id in range(vocab_size)}
    tokens = rng.integers(0, vocab_size, shape[1]).tolist()
    places = list(range(shape[1]))
    text = HeatMap("a thousand", tokens, texts, [lens], vocab_size, places, tokens, "x").to_html()
    assert len(text.encode()) < 3_000_000
    path = tmp_path / "thousand.html"
    path.write_text(text, encoding="utf-8")
    with opened(chromium, path) as page:
        assert page.locator(".column").count() < 40  # of 1,000: only those in view are elements
        page.focus(".map")
        page.keyboard.press("Home")
        assert page.locator("#c0-0").is_visible()
        page.keyboard.press("End")
        assert page.locator("#c999-0").is_visible() and page.locator(".column").count() < 40


@pytest.mark.parametrize("kind", SCRIPTS)
def test_own_code_is_small(kind):
    assert 20_000 < len(write_page(kind, "", {}, {}).encode()) <= 60_000
