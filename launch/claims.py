"""What a paper claims, held against the numbers of a sweep: agrees, disagrees or undecided.

A sweep file lists its claims. A claim compares two cells of the table:

    claims:
      - claim: "SimCLR: synthetic (w = 8) beats real"
        paper: "62.0 against 60.4"        # free text, with `source:` beside it
        metric: linear/fashion-probe/labels_per_class=10
        left: {data: synthetic, train.method: simclr, generate.guidance_scale: 8}
        right: {data: real, train.method: simclr}
        expect: ">"                       # or "<", or "=" with `margin:` in points

or says which value of an axis is best (`paper` may list several: then one of them is):

      - {claim: "SimCLR likes w = 8", metric: ..., argmax: {over: generate.guidance_scale, where: {...}, paper: 8}}

`left` and `right` may list several cells, of which the best by `choose_by: METRIC` is taken. Taking the best by `metric`
itself would tune on the test, so that is refused. Another protocol on the same test pictures is allowed and noted: it is
less biased, not unbiased; a metric on another data set is clean. A fixed cell needs none of this.

Statistics. The difference of two means over seeds has Welch's t interval at 95 % (B. L. Welch, Biometrika 34, 1947; advised
for comparing training algorithms over few seeds by Colas et al., arXiv 1904.06979). Seeds are not paired: equal seeds on
other data or another method share little, and with three seeds a paired interval keeps 2 degrees of freedom and Welch's up
to 4. The interval is over seeds only: all runs see the same test pictures, and other pictures would move all of them.

- `>`: agrees where the whole interval lies above 0, disagrees where it lies below, else undecided. `<` likewise.
- `=`: agrees where it lies within the margin either side of 0 (two one-sided tests: D. J. Schuirmann, J. Pharmacokin.
  Biopharm. 15, 1987; here at 95 %, which is stricter than their usual 90 %), disagrees where it lies wholly outside.
- argmax: agrees where one of the paper's values beats every other value (an intersection of tests, each at full level:
  R. L. Berger, Technometrics 24, 1982), disagrees where another value beats all of the paper's. Where any one of k
  tests may decide, each is at 95 % corrected by Bonferroni, 1 - 0.05 / k.
- Fewer than two seeds, or seeds that all gave one number, on either side: undecided.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from launch.aggregate import NotRun, Number, Unavailable, agrees_with, parse_metric, select, values_of, where_words
from launch.render import Cell
from stablerep.runtime.errors import UsageError

HEAD = ("claim", "paper", "here", "difference [95 %]", "verdict", "note")


@dataclass(frozen=True)
class Claim:
    """One entry of `claims:`."""

    claim: str
    metric: str
    paper: str = ""
    source: str = ""
    left: Any = None
    right: Any = None
    expect: str = ">"
    margin: float = 0.0
    choose_by: str = ""
    argmax: dict[str, Any] | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim judged: the numbers here, their difference in points, its interval where seeds give one, and why."""

    claim: Claim
    verdict: str
    here: str = ""
    gap: float | None = None
    interval: tuple[float, float] | None = None
    why: str = ""


def read_claims(spec: dict[str, Any]) -> list[Claim]:
    """The claims of a parsed sweep file. Raises UsageError where one cannot be judged as it is written."""
    known = [f.name for f in fields(Claim)]
    claims = []
    for number, entry in enumerate(spec.get("claims") or [], 1):
        if not isinstance(entry, dict) or not {"claim", "metric"} <= entry.keys():
            raise UsageError(f"claim {number} needs `claim:` and `metric:`")
        if strange := sorted(map(str, entry.keys() - set(known))):
            raise UsageError(f"claim {number}: unknown key {', '.join(strange)}; known: {', '.join(known)}")
        claim = Claim(**{**entry, "paper": str(entry.get("paper", ""))})
        claims.append(claim)
        parse_metric(claim.metric)
        if claim.argmax is not None:
            if not isinstance(claim.argmax, dict) or claim.argmax.keys() != {"over", "where", "paper"}:
                raise UsageError(f"claim {number}: argmax needs `over:`, `where:` and `paper:`")
            continue
        sides = [cell for side in (claim.left, claim.right) for cell in (side if isinstance(side, list) else [side])]
        if not sides or not all(isinstance(cell, dict) for cell in sides):
            raise UsageError(f"claim {number} needs `left:` and `right:` (cells), or `argmax:`")
        if claim.expect not in (">", "<", "="):
            raise UsageError(f"claim {number}: expect is one of > < =")
        if (claim.expect == "=") != (claim.margin > 0):
            raise UsageError(f"claim {number}: `margin:` (points, above 0) goes with `expect: =`, and only with it")
        if (len(sides) > 2) != bool(claim.choose_by):
            raise UsageError(f"claim {number}: `choose_by:` goes with a list of cells, and only with it")
        if claim.choose_by and parse_metric(claim.choose_by)[:2] == parse_metric(claim.metric)[:2]:
            raise UsageError(f"claim {number}: choosing by the metric that judges would be tuning on the test")
    return claims


def welch(left: Number, right: Number, tests: int = 1) -> tuple[float, float] | None:
    """(low, high) of `left - right` in points, at 95 % or, for one of `tests`, 1 - 0.05 / tests. None without spread."""
    import warnings

    from scipy import stats

    a, b = list(left.by_seed.values()), list(right.by_seed.values())
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    with warnings.catch_warnings():  # scipy's, of one side without spread: Welch's interval is then that of the other alone
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 0.05 / tests)
    return float(low), float(high)


def no_spread(numbers: Sequence[Number]) -> str:
    """Why numbers have no interval over seeds."""
    return "one seed" if not all(n.pooled for n in numbers) else "the seeds gave equal numbers"


def take(numbers: Sequence[Number], claim: Claim, side: Any) -> tuple[Number, str]:
    """(the number of one side, how it was chosen): the cell itself, or the best of a list by `choose_by`."""
    if not isinstance(side, list):
        return select(numbers, claim.metric, side), ""
    best = max(side, key=lambda cell: select(numbers, claim.choose_by, cell).mean)
    same = parse_metric(claim.choose_by)[1] == parse_metric(claim.metric)[1]
    return select(numbers, claim.metric, best), (
        f"{where_words(best)} chosen by {claim.choose_by}{', on the same test pictures' if same else ''}"
    )


def compare(numbers: Sequence[Number], claim: Claim) -> Verdict:
    """Judge a claim on two cells. Raises Unavailable."""
    (left, how_left), (right, how_right) = take(numbers, claim, claim.left), take(numbers, claim, claim.right)
    here = f"{left.text()} against {right.text()}"
    chosen = "; ".join(filter(None, (how_left, how_right)))
    gap, interval = left.mean - right.mean, welch(left, right)
    if interval is None:
        why = "; ".join(filter(None, (no_spread([left, right]), chosen)))
        return Verdict(claim, "undecided", here, gap, None, why)
    low, high = interval
    if claim.expect == "=":
        yes, no = -claim.margin < low and high < claim.margin, low > claim.margin or high < -claim.margin
    else:
        yes, no = (low > 0, high < 0) if claim.expect == ">" else (high < 0, low > 0)
    margin = f"margin {claim.margin:g}" if claim.expect == "=" else ""
    why = "; ".join(filter(None, (margin, chosen)))
    return Verdict(claim, "agrees" if yes else "disagrees" if no else "undecided", here, gap, interval, why)


def best_value(numbers: Sequence[Number], claim: Claim) -> Verdict:
    """Judge a claim on the best value of an axis. Raises Unavailable."""
    assert claim.argmax is not None
    over, where, paper = (claim.argmax[k] for k in ("over", "where", "paper"))
    wanted = paper if isinstance(paper, list) else [paper]
    seen = [n for n in numbers if n.column.fits(claim.metric) and agrees_with(n.axes, where) and n.axes.get(over) is not None]
    every = {value: select(numbers, claim.metric, {**where, over: value}) for value in values_of(seen, over)}
    ours = [n for value, n in every.items() if value in wanted]
    others = [n for value, n in every.items() if value not in wanted]
    if not ours:
        raise NotRun(where_words({**where, over: " or ".join(map(str, wanted))}) + f" ({claim.metric})")
    if not others:
        raise NotRun(f"{where_words(where)} with any other {over} ({claim.metric})")
    here = "; ".join(f"{n.text()} at {where_words({over: value})}" for value, n in every.items())
    champion, rival = max(ours, key=lambda n: n.mean), max(others, key=lambda n: n.mean)
    gap = champion.mean - rival.mean
    if any(welch(p, q) is None for p in ours for q in others):
        return Verdict(claim, "undecided", here, gap, None, no_spread([*ours, *others]))

    def beats(one: Number, all_of: list[Number], tests: int) -> bool:
        return all(ends is not None and ends[0] > 0 for ends in (welch(one, other, tests) for other in all_of))

    if any(beats(p, others, len(ours)) for p in ours):
        verdict = "agrees"
    else:
        verdict = "disagrees" if any(beats(q, ours, len(others)) for q in others) else "undecided"
    tests = len(ours) if champion.mean >= rival.mean else len(others)
    why = "paper's best less best other" + (f", corrected for {tests} tests" if tests > 1 else "")
    return Verdict(claim, verdict, here, gap, welch(champion, rival, tests), why)


def judge(numbers: Sequence[Number], claims: Sequence[Claim]) -> list[Verdict]:
    """Every claim's verdict, in order."""
    verdicts = []
    for claim in claims:
        try:
            verdicts.append((compare if claim.argmax is None else best_value)(numbers, claim))
        except Unavailable as why:
            verdicts.append(Verdict(claim, "not run" if isinstance(why, NotRun) else "not judged", why=str(why)))
    return verdicts


def claim_rows(verdicts: Sequence[Verdict]) -> list[list[Cell]]:
    """The rows of the claims table, under HEAD."""
    rows = []
    for v in verdicts:
        paper = f"{v.claim.paper} ({v.claim.source})" if v.claim.source else v.claim.paper
        difference = "" if v.gap is None else f"{v.gap:+.1f}"
        difference += f" [{v.interval[0]:+.1f}, {v.interval[1]:+.1f}]" if v.interval else ""
        rows.append([*map(Cell, (v.claim.claim, paper, v.here, difference, v.verdict, v.why))])
    return rows


def summary(verdicts: Sequence[Verdict]) -> str:
    """How the claims came out, and how many would by chance."""
    kinds = ("agrees", "disagrees", "undecided", "not run", "not judged")
    counts = ", ".join(f"{kind} {sum(v.verdict == kind for v in verdicts)}" for kind in kinds)
    tested = sum(v.interval is not None and v.claim.expect != "=" for v in verdicts)
    return (
        f"{len(verdicts)} claims: {counts}. {tested} of them look for a difference, at 95 %: if there were none anywhere, "
        f"about {0.05 * tested:.1f} would still come out decided by chance, half of these as agreement. "
        "The intervals are over seeds (Welch); other test pictures are not in them."
    )
