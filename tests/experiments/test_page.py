"""The page in a real browser: nothing overlaps, nothing sticks out, nothing is missing."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.browser import browser, why_not
from experiments.written_runs import pair_records, write_run
from lorapro.experiments.report import Report
from lorapro.experiments.results import read_results

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

METHODS = (
    *("full", "full-muon", "lora", "rslora", "lora+", "pissa", "dora", "adalora", "lora-fa"),
    *("lora-ga", "riemannian", "lora-pro", "lora-pro-full", "lora-ga+lora-pro-factored"),
    "lora-ga+lora-pro-muon",
)

# Texts of one figure, and cards and cells of the page, whose boxes share more than a hair.
OVERLAPS = """
const found = [];
const boxes = (nodes) => [...nodes].map((n) => [n.textContent.trim(), n.getBoundingClientRect()])
  .filter(([text, box]) => text && box.width > 0);
const compare = (list) => {
  for (let i = 0; i < list.length; i++) for (let j = 0; j < i; j++) {
    const [a, p] = list[i], [b, q] = list[j];
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 1 && high > 2) found.push(a + ' | ' + b);
  }
};
document.querySelectorAll('svg').forEach((svg) => compare(boxes(svg.querySelectorAll('text'))));
compare(boxes(document.querySelectorAll('h1, h2, h3, h4, .chip, p, figcaption')));
document.querySelectorAll('table').forEach((t) => compare(boxes(t.querySelectorAll('tr'))));
return found;
"""

# What sticks out of the window or of its own figure, except what scrolls by itself.
STICKING_OUT = """
const found = [], wide = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > wide) found.push('the page');
document.querySelectorAll('body *').forEach((node) => {
  if (node.closest('.scroll') && !node.matches('.scroll')) return;
  const box = node.getBoundingClientRect();
  if (box.width && (box.right > wide + 0.5 || box.left < -0.5))
    found.push(node.outerHTML.slice(0, 90));
});
document.querySelectorAll('svg').forEach((svg) => {
  const frame = svg.getBoundingClientRect();
  svg.querySelectorAll('text').forEach((text) => {
    const box = text.getBoundingClientRect();
    if (box.right > frame.right + 2 || box.left < frame.left - 2) found.push(text.textContent);
  });
});
return found;
"""

FIGURES = """
return [...document.querySelectorAll('figure')].map((figure) => ({
  title: figure.querySelector('h3').textContent,
  panels: [...figure.querySelectorAll('svg')].map((svg) => ({
    wide: svg.getBoundingClientRect().width, high: svg.getBoundingClientRect().height,
    lines: svg.querySelectorAll('path, use').length, words: svg.querySelectorAll('text').length,
    smallest: Math.min(...[...svg.querySelectorAll('text')].map(
      (t) => parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width
             / svg.viewBox.baseVal.width)),
  }))}));
"""

CONTRAST = """
const colour = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
const light = (text) => colour(text).map((c) => c / 255)
  .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const page = light(getComputedStyle(document.body).backgroundColor);
const ratio = (value) => (Math.max(value, page) + 0.05) / (Math.min(value, page) + 0.05);
return {
  page: getComputedStyle(document.body).backgroundColor,
  text: Math.min(...[...document.querySelectorAll('p, td, th, figcaption')].map(
    (n) => ratio(light(getComputedStyle(n).color)))),
  figures: Math.min(...[...document.querySelectorAll('svg text')].map(
    (n) => ratio(light(getComputedStyle(n).fill)))),
};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two pages: fifteen methods on one task, and a grid of two tasks."""
    root, random = tmp_path_factory.mktemp("page"), np.random.default_rng(3)
    names = [f"base_model.model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for k, label in enumerate(METHODS):
        for factor in (0.25, 0.5, 1.0, 2.0):
            for seed in range(3 if factor == 1.0 else 1):
                loss = 0.5 + 0.02 * np.sin(k) + 0.05 * abs(np.log2(factor)) + random.normal(0, 0.01)
                write_run(
                    root / "many",
                    label,
                    (1e-5 if label == "full" else 1e-3) * factor,
                    seed,
                    test=loss,
                    validation=loss,
                    accuracy=1 - loss,
                    status="diverged" if factor == 2.0 and k % 4 == 0 else "finished",
                    curve={s: 3 / s + loss for s in range(5, 200, 5)},
                    records=pair_records(names, range(1, 30)) if label == "lora-pro" else None,
                    optimizer_state_bytes=2**20 * (1 + 3 * k),
                    peak_memory_bytes=2**30 * (1 + 0.1 * k),
                )
    for task in ("metamath", "code"):
        for batch in (16, 64, 256, 1024):
            for k, label in enumerate(("full", "lora", "lora-pro-muon")):
                for seed in range(2):
                    loss = 3 + 0.1 * np.log2(batch) * (k + 1) + random.normal(0, 0.01)
                    axes = {"batch_size": batch}
                    write_run(root / "grid", label, 1e-3, seed, task=task, axes=axes, test=loss)
    written = {}
    for name in ("many", "grid"):
        written[name] = root / f"{name}.html"
        Report(read_results(root / name)).save(written[name])
    return written


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


@pytest.mark.parametrize("name", ["many", "grid"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_the_page_is_legible(pages, page, name, width, dark):
    page.open(pages[name], width=width, dark=dark)
    page.run("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert page.run("return document.documentElement.clientWidth") == width
    assert page.run(STICKING_OUT) == []
    assert page.run(OVERLAPS) == []
    figures = page.run(FIGURES)
    titles = [figure["title"] for figure in figures]
    wanted = ["Validation loss over steps", "Training loss over steps", "Cost against quality"]
    if name == "many":
        wanted += ["Validation loss against the learning rate", "Difference from tuned lora"]
        wanted += ["lora-pro: rank of A and B"]
    else:
        wanted += ["Test loss against batch size (code)"]
    assert set(wanted) <= set(titles)
    for figure in figures:
        assert figure["panels"], figure["title"]
        for panel in figure["panels"]:
            assert panel["wide"] > 200, figure["title"]
            assert panel["high"] > 100, figure["title"]
            assert panel["lines"] > 3, figure["title"]
            assert panel["words"] > 3, figure["title"]
            assert panel["smallest"] > 8.5, figure["title"]
    contrast = page.run(CONTRAST)
    assert contrast["page"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert contrast["text"] > 4.5
    assert contrast["figures"] > 4.5


def test_nothing_is_fetched(pages, page):
    page.open(pages["grid"], width=1280)
    names = page.run("return performance.getEntriesByType('resource').map((r) => r.name)")
    assert names == []
    assert page.run("return document.scripts.length") == 0
    ids = page.run("return [...document.querySelectorAll('[id]')].map((n) => n.id)")
    assert len(ids) == len(set(ids)) > 0
