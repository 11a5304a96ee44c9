"""Numbers, names and lengths of the pages; that they run is tests/test_snippets.py."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

import lorapro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import fill_docs  # noqa: E402

PAGES = [p for p in fill_docs.PAGES if "api" not in p.parts]
FENCE = re.compile(r"^([ \t]*)(`{3,}).*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.,/-])[-+−±]?\d[\d.,]*(?:e-?\d+)?(?![\w(/-])")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = "src|tests|docs|tools|results|recipes|examples|benchmarks"


def name(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """A page's lines without fenced blocks, comments and what was generated."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = fill_docs.TABLE.sub("", text)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines()


def test_no_line_begins_with_a_value():
    """A comment at the head of a line ends the paragraph, for CommonMark and for mkdocs."""
    for page in fill_docs.PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert not line.startswith("<!--v:"), f"{name(page)}:{number}: {line:.60}"


def codes():
    return [(name(p), code) for p in fill_docs.PAGES for code in CODE.findall("\n".join(prose(p)))]


def test_every_number_is_its_sources():
    assert fill_docs.stale() == []


def test_a_changed_number_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    text = fill_docs.filled(
        "So <!--v:share-tangent-small-->0 %<!--/v-->, <!--table:costs--> <!--/table-->"
    )
    monkeypatch.setattr(fill_docs, "ROOT", tmp_path)
    monkeypatch.setattr(fill_docs, "PAGES", [page])
    page.write_text(text, encoding="utf-8")
    assert fill_docs.stale() == []
    share = re.search(r"(\d+) %", text)[1]
    page.write_text(text.replace(f"{share} %", f"{int(share) + 1} %"), encoding="utf-8")
    (line,) = fill_docs.stale()
    assert line.startswith("page.md:1:")


def test_values_of_cells_and_constants():
    cell = {"file": "results/lab/demo/table.md", "section": "lab", "row": "lora-pro-muon"}
    cell["column"] = "minus lora"
    assert re.fullmatch(r"−0\.\d{4}", fill_docs.value(cell))
    assert re.fullmatch(r"0\.\d\d", fill_docs.value({**cell, "size": True, "digits": 2}))
    assert fill_docs.value({"code": "lorapro.rates.RATES.efficient"}) == "1e-3"
    with pytest.raises(LookupError, match="no row 'lora-pro-moun', only"):
        fill_docs.value({**cell, "row": "lora-pro-moun"})
    with pytest.raises(LookupError, match="no 'RATE' in"):
        fill_docs.value({"code": "lorapro.rates.RATE"})
    with pytest.raises(LookupError, match="no value 'nothing'"):
        fill_docs.filled("<!--v:nothing-->1<!--/v-->")


def test_the_tables_of_the_laboratory_are_those_of_its_runs():
    from lorapro.experiments.report import Report
    from lorapro.experiments.results import read_results

    for folder in {(ROOT / v["file"]).parent for v in values() if "lab/" in v.get("file", "")}:
        made = Report(read_results(folder)).markdown()
        verdicts = made[made.index("## Verdicts") : made.index("## Conditions")]
        assert verdicts in (folder / "table.md").read_text(encoding="utf-8")


def values():
    import yaml

    return yaml.safe_load(fill_docs.VALUES.read_text(encoding="utf-8")).values()


def test_every_name_of_the_package_exists():
    seen = 0
    for page, code in codes():
        for path in re.findall(r"(?<![\w/.-])lorapro\.[A-Za-z_][\w.]*\w", code):
            seen += 1
            try:
                fill_docs.named(path)
            except LookupError as error:
                pytest.fail(f"{page}: {error}")
        if found := re.match(r"(?:lorapro\.)?(LoraPro\w+)", code):
            seen += 1
            assert found[1] in lorapro.__all__, f"{page}: {code}"
    assert seen > 20


def test_the_reference_has_every_public_name():
    pages = (ROOT / "docs/api").glob("*.md")
    shown = re.findall(
        r"^::: lorapro\.([\w.]+)", "\n".join(p.read_text("utf-8") for p in pages), re.M
    )
    modules = {n for n in lorapro.__all__ if inspect.ismodule(getattr(lorapro, n))}
    assert set(lorapro.__all__) - modules - set(shown) == set()
    # what the modules hold for those who write their own: at least something of each
    inner = {"export", "factors", "optim", "param_groups", "trainer"}  # shown by the names above
    assert modules - inner - {name.split(".")[0] for name in shown} == set()


def test_every_option_of_a_call_exists():
    from lorapro.optim.create import OPTIMIZERS

    own = {p for cls in OPTIMIZERS.values() for p in inspect.signature(cls).parameters}
    seen = 0
    for page, code in codes():
        call = re.fullmatch(r"(?:lorapro\.)?([\w.]+)\((.*)\)", code)
        if call is None or call[1].split(".")[0] not in lorapro.__all__:
            continue
        parameters = inspect.signature(fill_docs.named(f"lorapro.{call[1]}")).parameters
        known = {*parameters, *(own if "kwargs" in parameters else ())}
        for option in re.findall(r"(\w+)=", call[2]):
            seen += 1
            assert option in known, f"{page}: {code} has no {option}"
    assert seen > 3


def test_every_file_that_is_named_exists():
    for page, code in codes():
        if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]+", code):
            assert (ROOT / code).exists(), f"{page}: {code}"


def test_every_test_that_is_named_exists():
    files = (ROOT / "tests").rglob("test_*.py")
    there = {t for f in files for t in re.findall(r"^def (test_\w+)", f.read_text("utf-8"), re.M)}
    named = [(page, code) for page, code in codes() if re.fullmatch(r"test(_\w+){3,}", code)]
    assert len(named) > 10
    for page, code in named:
        assert code in there, f"{page}: {code}"


def test_every_method_of_the_tables_exists():
    from lorapro.experiments.methods.catalogue import find_method

    others = ("lora-pro-adamw", "lora-pro-steady")
    for page, code in codes():
        if (
            re.fullmatch(r"(?:lora|full|rslora|dora|balanced)-[a-z+-]+", code)
            and code not in others
        ):
            assert find_method(code), f"{page}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_is_short_and_its_prose_has_few_numbers(page):
    words = len(FENCE.sub("", page.read_text(encoding="utf-8")).split())
    assert words <= (700 if page.name == "README.md" else 1500), f"{words} words"
    for line in prose(page):
        if line.startswith(("|", "    ", "#")):
            continue
        plain = re.sub(r"\]\([^)]*\)", "]", CODE.sub("", line))
        found = NUMBER.findall(plain)
        assert len(found) <= 3, f"{name(page)}: {found} in {line!r}"
