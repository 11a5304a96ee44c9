"""The documentation as a browser shows it: on a telephone and wide, in light and dark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.browser import browser, why_not

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# What reaches beyond the window and is in nothing that scrolls; pictures that did not load.
LOOK = """
const width = document.documentElement.clientWidth, found = [];
for (const element of document.querySelectorAll('.md-content *')) {
    if (element.getBoundingClientRect().right <= width + 1) continue;
    let around = element;
    while (around && getComputedStyle(around).overflowX == 'visible') around = around.parentElement;
    if (!around || around === document.body || around === document.documentElement)
        found.push(element.tagName + ' ' + element.textContent.trim().slice(0, 60));
}
for (const picture of document.images)
    if (!picture.complete || !picture.naturalWidth) found.push('no picture ' + picture.src);
return found;
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_fits_a_telephone(site):
    pages = [p for p in sorted(site.rglob("*.html")) if p.name != "404.html"]
    assert len(pages) > 30
    with browser() as page:
        for path in pages:
            page.open(path, width=390)
            assert page.run(LOOK) == [], path.relative_to(site)


def test_the_first_page_follows_the_readers_scheme(site):
    for dark, scheme in ((False, "default"), (True, "slate")):
        with browser() as page:  # with nothing remembered
            page.open(site / "index.html", width=1280, dark=dark)
            assert page.run("return document.body.dataset.mdColorScheme") == scheme
            assert page.run(LOOK) == []
