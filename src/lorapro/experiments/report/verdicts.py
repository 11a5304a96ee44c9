"""A sentence of verdict a method, in words that the numbers bear."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorapro.experiments.report.comparison import (
    BETTER,
    ONE_SEED,
    TARGET,
    TIE,
    WORSE,
    Comparison,
    Row,
    Versus,
)
from lorapro.experiments.report.text import (
    count,
    is_loss,
    listed,
    measure_name,
    number,
    p_text,
    signed,
    with_interval,
)
from lorapro.experiments.statistics import smallest_sign_flip_p

__all__ = ["gap_sentence", "how_to_read", "lead", "many_verdict", "verdict", "warnings"]


def verdict(found: Comparison, row: Row) -> str:
    """One row of one problem against the baseline, the rival and the gap."""
    name = measure_name(found.measure)
    if row.summary is None:
        return f"No run with a finite {name}." if len(row.runs) else "No finished run."
    value = number(found.measure, row.summary.mean, row.summary.sd)
    if row.label == found.baseline:
        seeds = count(row.summary.count, "seed")
        return f"What the others are compared with: {name} {value}, {seeds}."
    versus = row.versus.get(found.baseline)
    if versus is None:
        return f"{name.capitalize()} {value}; there is no {found.baseline} to compare it with."
    parts = [_against(found, versus)]
    parts += [_against(found, v) for other, v in row.versus.items() if other != found.baseline]
    if row.share is not None:
        low, high = (f"{100 * end:.0f}" for end in (row.share.low, row.share.high))
        parts.append(
            f"It closes {100 * row.share.size:.0f} % of the gap (95 %: {low} to {high} %)."
        )
    if row.lost:
        parts.append(f"{row.lost} of {len(row.runs)} runs at this rate diverged or failed.")
    return " ".join(parts)


def _against(found: Comparison, versus: Versus) -> str:
    measure, other = found.measure, versus.other
    name = measure_name(measure)
    if versus.interval is None:
        size = signed(measure, versus.size)
        if other != found.baseline:
            return f"Against {other} {size}."
        if versus.boot is not None:
            low, high = (signed(measure, end) for end in (versus.boot.low, versus.boot.high))
            size += f" ({low} to {high} from the test items alone)"
        return f"One seed, so no verdict: {name} {size} against {found.baseline_name}."
    size = with_interval(measure, versus.interval)
    words = {BETTER: "Better than", WORSE: "Worse than", TIE: "A tie with"}[versus.verdict]
    main = other == found.baseline
    tuned = found.baseline_name if main else other
    if versus.alone:
        side = "better" if (versus.size < 0) == is_loss(measure) else "worse"
        return (
            f"A tie with {tuned} once {count(versus.family, 'comparison')} are allowed for "
            f"(p = {p_text(versus.holm)}); alone it would be {side}: {name} {size}."
        )
    if not main:
        return f"{words} {tuned} ({size})."
    return f"{words} {tuned}: {name} {size} over {count(versus.seeds, 'seed')}."


def many_verdict(comparisons: list[Comparison], label: str) -> str:
    """One row over several problems."""
    by_verdict: dict[str, list[str]] = {}
    alone = []
    baseline = listed(list(dict.fromkeys(found.baseline_name for found in comparisons)))
    for found in comparisons:
        row = found.row(label)
        versus = row.versus.get(found.baseline) if row is not None else None
        if row is None or versus is None:
            continue
        name = f"{found.problem.name} ({_short(found.measure, versus)})"
        by_verdict.setdefault(versus.verdict, []).append(name)
        if versus.alone:
            side = "better" if (versus.size < 0) == is_loss(found.measure) else "worse"
            alone.append(f"{side} on {found.problem.name}")
    words = {
        BETTER: "better than {} on",
        WORSE: "worse than {} on",
        TIE: "a tie with {} on",
        ONE_SEED: "one seed, so no verdict, on",
    }
    parts = [
        f"{words[kind].format(baseline)} {listed(by_verdict[kind])}"
        for kind in words
        if kind in by_verdict
    ]
    if not parts:
        return f"Nothing to compare with {baseline} here."
    text = "; ".join(parts)
    if alone:
        text += f". Without the correction for many comparisons it would be {listed(alone)}"
    return text[0].upper() + text[1:] + "."


def _short(measure: str, versus: Versus) -> str:
    if versus.interval is None:
        return signed(measure, versus.size)
    return with_interval(measure, versus.interval)


def lead(comparisons: Sequence[Comparison]) -> list[str]:
    """The whole in a few sentences: who is better or worse than the baseline anywhere; the gaps."""
    several = len(comparisons) > 1
    baseline = listed(list(dict.fromkeys(found.baseline_name for found in comparisons)))
    lines = []
    ties = one_seed = 0
    for kind in (BETTER, WORSE):
        for found in comparisons:
            verdicts = [
                (r.label, r.versus[found.baseline].verdict)
                for r in found.rows
                if found.baseline in r.versus
            ]
            if labels := [label for label, said in verdicts if said == kind]:
                where = f" on {found.problem.name}" if several else ""
                lines.append(
                    f"{kind.capitalize()} than {found.baseline_name}{where}: {listed(labels)}."
                )
            if kind == BETTER:
                ties += sum(said == TIE for _, said in verdicts)
                one_seed += sum(said == ONE_SEED for _, said in verdicts)
    if ties and not lines:
        everywhere = " on every problem" if several else ""
        lines.append(
            f"Every method ties with {baseline}{everywhere}: no difference is beyond noise once "
            "all comparisons are allowed for."
        )
    elif ties:
        lines.append(f"Everything else ({count(ties, 'comparison')}) is a tie.")
    if one_seed and not lines:
        lines.append("One seed: differences are shown, but what is noise cannot be told.")
    elif one_seed:
        lines.append(f"{count(one_seed, 'comparison').capitalize()} of one seed: no verdict.")
    gaps = [(f, sentence) for f in comparisons if (sentence := gap_sentence(f))]
    if not several:
        return lines + [sentence for _, sentence in gaps]
    none = [f.problem.name for f, sentence in gaps if sentence.endswith("no gap beyond noise.")]
    if none:
        lines.append(f"No gap from {baseline} to full fine-tuning beyond noise on {listed(none)}.")
    return lines + [f"{f.problem.name}: {s}" for f, s in gaps if f.problem.name not in none]


def gap_sentence(found: Comparison) -> str | None:
    """How far the target is from the baseline, and whether that is more than noise."""
    gap = found.gap
    if gap is None:
        return None
    sign = -1.0 if is_loss(found.measure) else 1.0
    name = "full fine-tuning" if found.goal == TARGET else found.goal
    value = signed(found.measure, sign * gap.size).removeprefix("+")
    text = f"Gap from {found.baseline} to {name}: {value} of {measure_name(found.measure)}"
    if gap.interval is None:
        text += ". One seed gives no estimate of its noise: run more before believing a share"
        if gap.boot is not None:
            low, high = sorted(sign * end for end in (gap.boot.low, gap.boot.high))
            ends = f"{signed(found.measure, low)} to {signed(found.measure, high)}"
            text += f" (the test items alone leave {ends} open)"
        return f"{text}."
    half = number(found.measure, gap.interval.half)
    ahead = sign * gap.size > 0
    end = ": no gap beyond noise"
    if gap.interval.excludes_zero:
        behind = f": taken alone, {name} is behind {found.baseline} beyond noise"
        end = ": a gap beyond noise" if ahead else behind
    return f"{text}, 95 % interval ± {half} over {count(gap.seeds, 'seed')}{end}."


def how_to_read(found: Comparison) -> list[str]:
    """The sentences under a table: what its columns are, and what its seeds can show at all."""
    seeds = len(found.seeds)
    if seeds < 2:
        return ["One seed: what is noise and what is not cannot be told. Run more seeds."]
    spread = {row.summary.count for row in found.rows if row.summary is not None}
    over = count(seeds, "seed") if spread == {seeds} else f"{min(spread)} to {max(spread)} seeds"
    lines = [f"Mean ± standard deviation over {over}."]
    if any(found.baseline in row.versus for row in found.rows):
        boot = any(v.boot for row in found.rows for v in row.versus.values())
        items = " and the interval of resampled seeds and items leaves zero out" if boot else ""
        lines.append(
            f"minus {found.baseline}: difference seed by seed with its 95 % t-interval. It is "
            "called better or worse where p, corrected for the table's comparisons (Holm), is "
            f"below 0.05{items}; else a tie."
        )
        least = smallest_sign_flip_p(seeds)
        if least > 0.05 / max(1, len(found.rows) - 1):
            lines.append(
                f"Without assuming normal noise {count(seeds, 'seed')} cannot give a p below "
                f"{least:.2g} for one comparison."
            )
    return lines


def warnings(found: Comparison) -> list[str]:
    """Rates at the edge of their grid, runs without a value."""
    lines = []
    for row in found.rows:
        if row.edge:
            lines.append(
                f"{row.label}: the best learning rate, {row.rate:g}, is the {row.edge} of its "
                "grid; a better one may lie beyond"
            )
        if row.lost and not math.isnan(row.rate):
            lines.append(
                f"{row.label}: {row.lost} of {len(row.runs)} runs at learning rate {row.rate:g} "
                "diverged or failed; the mean is over the others"
            )
    return lines
