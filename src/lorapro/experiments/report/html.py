"""One self-contained page: verdicts, tables, figures, conditions. No network, no scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lorapro.experiments.report.comparison import Comparison
from lorapro.experiments.report.drawing import COLORS, FigurePanels
from lorapro.experiments.report.tables import Table
from lorapro.experiments.report.text import count
from lorapro.experiments.report.verdicts import lead, many_verdict, verdict

__all__ = ["Section", "page", "verdict_cards"]


@dataclass
class Section:
    """A heading, and under it in this order: tables, figures, both of them folded away."""

    title: str
    tables: list[Table] = field(default_factory=list)
    figures: list[FigurePanels] = field(default_factory=list)
    folded_figures: list[FigurePanels] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The name that links lead to."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass
class Card:
    """A method's verdict: its sentence, and a word for each problem."""

    label: str
    sentence: str
    chips: list[tuple[str, str]]  # (verdict, how often: "2 × ")


def verdict_cards(comparisons: Sequence[Comparison]) -> list[Card]:
    """A card a method, in the order of the recipes."""
    labels = dict.fromkeys(row.label for found in comparisons for row in found.rows)
    cards = []
    for label in labels:
        rows = [(found, row) for found in comparisons if (row := found.row(label)) is not None]
        if len(comparisons) == 1:
            sentence = verdict(*rows[0])
        elif all(label == found.baseline for found, _ in rows):
            sentence = "What the others are compared with."
        else:
            sentence = many_verdict(list(comparisons), label)
        said = [row.versus[f.baseline].verdict for f, row in rows if f.baseline in row.versus]
        several = len(comparisons) > 1
        chips = [(w, f"{said.count(w)} × " if several else "") for w in dict.fromkeys(said)]
        cards.append(Card(label, sentence, chips))
    return cards


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorapro.experiments.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["nice"] = nice
    return environment.get_template("page.html.j2")


def nice(text: str) -> str:
    """Typography of a page: real minus signs, no line break around a plus-minus.

    >>> nice("lora-pro: -0.1 ± 0.2")
    'lora-pro: −0.1\xa0±\xa00.2'
    """
    return re.sub(r"(^|[\s(])-(?=\d)", r"\1−", text).replace(" ± ", "\xa0±\xa0")


def page(
    title: str,
    comparisons: Sequence[Comparison],
    overview: Sequence[Table],
    sections: Sequence[Section],
    closing: Sequence[Table],
    *,
    toy: bool = False,
) -> str:
    """Render the page."""
    runs = [found.problem.runs for found in comparisons]
    total = sum(len(r.drop_duplicates("folder")) for r in runs)
    labels = {row.label for found in comparisons for row in found.rows}
    most = max(len(found.seeds) for found in comparisons)
    facts = [count(len(labels), "method"), count(len(comparisons), "problem")]
    facts += [("up to " if len(comparisons) > 1 else "") + count(most, "seed"), f"{total} runs"]
    if toy:
        facts.append("toy size: tiny random models, no finding")
    words: dict[str, str] = dict.fromkeys(COLORS, "")
    return str(
        _template().render(
            title=title,
            facts=facts,
            lead=lead(comparisons),
            cards=verdict_cards(comparisons),
            overview=overview,
            sections=sections,
            closing=closing,
            colors={**words, **COLORS},
            variable={color: f"var(--{word})" for word, color in COLORS.items()},
        )
    )
