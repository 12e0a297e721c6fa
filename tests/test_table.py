"""What a sweep ends with: intervals against scipy, every verdict on built rows, and files that stand alone."""

import csv
import json
import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from scipy import stats

from generation.identity import caption_id
from launch import table
from launch.aggregate import Unavailable, aggregate, select
from launch.claims import judge, read_claims, summary
from launch.plots import default_plots, draw, lines_of, read_plots
from launch.render import Cell, text_table
from stablerep.data.shards import Sample, write_shard
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import write_json

LINEAR = "linear/fashion-probe/labels_per_class=10"


def rows(axes, values, protocol="linear", setting=None, images=None, dataset="fashion-probe"):
    """A row for each of `values`, which belong to seeds 0, 1, ..."""
    setting = {"labels_per_class": 10} if setting is None and protocol == "linear" else setting or {}
    fixed = {"axes": axes, "protocol": protocol, "dataset": dataset, "metric": "top-1", "setting": setting, "images": images}
    return [
        {
            **fixed,
            "seed": s,
            "value": v,
            "low": v - 2.0,
            "high": v + 2.5,
            "n": 2000,
            "values": [v],
            "train": f"/runs/{axes}/{s}",
        }
        for s, v in enumerate(values)
    ]


def cell(method, w=None, **more):
    """The axes of a cell, real where there is no guidance."""
    real = {"data": "real"} if w is None else {"data": "synthetic", "generate.guidance_scale": w}
    return {**real, "train.method": method, **more}


def verdict(numbers, **claim):
    """(verdict, why) of one claim."""
    [found] = judge(numbers, read_claims({"claims": [{"claim": "c", "metric": LINEAR, **claim}]}))
    return found.verdict, found


def test_intervals_are_students():
    random = np.random.default_rng(0)
    made = [row for w in (1, 2, 4) for row in rows(cell("simclr", w), random.normal(50, 3, 2 + w).tolist())]
    frame = pd.DataFrame([{"w": r["axes"]["generate.guidance_scale"], "value": r["value"]} for r in made])
    for n, (w, group) in zip(aggregate(made), frame.groupby("w")["value"], strict=True):
        half = stats.t.ppf(0.975, len(group) - 1) * group.std(ddof=1) / math.sqrt(len(group))
        assert n.axes["generate.guidance_scale"] == w and n.pooled and len(n.train) == len(group)
        assert (n.mean, n.low, n.high) == pytest.approx((group.mean(), group.mean() - half, group.mean() + half))


def test_one_seed_keeps_its_own_interval_and_is_marked():
    [n] = aggregate(rows(cell("simclr", 2), [40.0]))
    assert (n.mean, n.low, n.high, n.pooled) == (40.0, 38.0, 42.5, False) and n.text() == "40.0 [38.0, 42.5]†"


def test_a_seed_scored_twice_counts_once_and_equal_seeds_have_no_width():
    [n] = aggregate([*rows(cell("simclr", 2), [40.0, 41.0]), *rows(cell("simclr", 2), [43.0])])
    assert n.by_seed == {0: 43.0, 1: 41.0} and n.mean == 42.0
    [n] = aggregate(rows(cell("simclr", 2), [40.0, 40.0]))
    assert (n.mean, n.low, n.high) == (40.0, 40.0, 40.0)


@pytest.mark.parametrize(
    ("left", "right", "expect", "wanted"),
    [
        ([50, 51, 52], [40, 41, 42], ">", "agrees"),
        ([40, 41, 42], [50, 51, 52], ">", "disagrees"),
        ([40, 41, 42], [50, 51, 52], "<", "agrees"),
        ([50, 51, 52], [40, 41, 42], "<", "disagrees"),
        ([40, 45, 50], [41, 43, 45], ">", "undecided"),
        ([40, 45, 50], [41, 43, 45], "<", "undecided"),
        ([40.0, 40.1, 40.2], [40.1, 40.2, 40.3], "=", "agrees"),
        ([50, 51, 52], [40, 41, 42], "=", "disagrees"),
        ([40, 41, 42], [50, 51, 52], "=", "disagrees"),
        ([40, 45, 50], [41, 43, 45], "=", "undecided"),
        ([50], [40, 41, 42], ">", "undecided"),
        ([50, 50], [40, 40], ">", "undecided"),
        ([50, 50, 50], [40, 41, 42], ">", "agrees"),
    ],
)
def test_verdicts_of_comparisons(left, right, expect, wanted):
    numbers = aggregate([*rows(cell("simclr", 8), left), *rows(cell("simclr"), right)])
    margin = {"margin": 1.0} if expect == "=" else {}
    got, found = verdict(numbers, left=cell("simclr", 8), right=cell("simclr"), expect=expect, **margin)
    assert got == wanted and found.gap == pytest.approx(np.mean(left) - np.mean(right))
    if len(left) == 1:
        assert found.interval is None and "one seed" in found.why
    elif left == [50, 50]:
        assert found.interval is None and "equal numbers" in found.why
    else:  # Welch by hand: the Welch-Satterthwaite degrees of freedom
        a, b = np.var(left, ddof=1) / len(left), np.var(right, ddof=1) / len(right)
        freedom = (a + b) ** 2 / (a**2 / (len(left) - 1) + b**2 / (len(right) - 1))
        half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
        assert found.interval == pytest.approx((found.gap - half, found.gap + half))


@pytest.mark.parametrize(
    ("by_w", "paper", "wanted"),
    [
        ({2: [40, 41, 42], 4: [44, 45, 46], 8: [50, 51, 52]}, 8, "agrees"),
        ({2: [40, 41, 42], 4: [44, 45, 46], 8: [50, 51, 52]}, 4, "disagrees"),
        ({2: [40, 41, 42], 4: [49, 50, 51], 8: [50, 51, 52]}, 8, "undecided"),
        ({2: [40, 41, 42], 4: [49, 50, 51], 8: [50, 51, 52]}, [4, 8], "agrees"),
        ({2: [60, 61, 62], 4: [49, 50, 51], 8: [50, 51, 52]}, [4, 8], "disagrees"),
        ({2: [40, 41, 42], 8: [50]}, 8, "undecided"),
        ({2: [40, 41, 42], 8: [50, 51, 52]}, 6, "not run"),
        ({8: [50, 51, 52]}, 8, "not run"),
    ],
)
def test_verdicts_of_the_best_value(by_w, paper, wanted):
    numbers = aggregate(r for w, values in by_w.items() for r in rows(cell("mae", w), values))
    argmax = {"over": "generate.guidance_scale", "where": {"data": "synthetic", "train.method": "mae"}, "paper": paper}
    assert verdict(numbers, argmax=argmax)[0] == wanted


def test_the_best_value_is_corrected_for_many_rivals():
    """A rival that would beat the paper's value in a single test does not where it is one of many that might."""
    close, far = [51.0, 52.0, 53.0], [48.4, 49.4, 50.4]  # Welch: 2.6 [0.33, 4.87] alone
    where = {"data": "synthetic", "train.method": "mae"}
    for rivals, wanted in (({4: close}, "disagrees"), ({4: close, 6: far, 8: far, 10: far}, "undecided")):
        numbers = aggregate(r for w, v in {2: far, **rivals}.items() for r in rows(cell("mae", w), v))
        assert verdict(numbers, argmax={"over": "generate.guidance_scale", "where": where, "paper": 2})[0] == wanted


def test_chance_decides_one_in_twenty():
    """Two methods that do not differ: both verdicts together come at the rate that the page states."""
    random = np.random.default_rng(0)
    decided = 0
    for _ in range(400):
        made = [
            *rows(cell("simclr", 8), random.normal(50, 1, 3).tolist()),
            *rows(cell("simclr"), random.normal(50, 1, 3).tolist()),
        ]
        decided += verdict(aggregate(made), left=cell("simclr", 8), right=cell("simclr"), expect=">")[0] != "undecided"
    assert 0.015 < decided / 400 < 0.085


def test_the_best_of_a_list_is_chosen_by_another_metric():
    made = [r for w, linear, knn in ((2, 60, 30), (8, 50, 40)) for r in
            [*rows(cell("simclr", w), [linear, linear + 1]), *rows(cell("simclr", w), [knn, knn + 1], "knn")]]  # fmt: skip
    numbers = aggregate([*made, *rows(cell("simclr"), [55, 55.5])])
    sides = {"left": [cell("simclr", 2), cell("simclr", 8)], "right": cell("simclr")}
    got, found = verdict(numbers, **sides, choose_by="knn/fashion-probe")
    assert got == "disagrees" and "guidance_scale=8" in found.why and "on the same test pictures" in found.why
    with pytest.raises(UsageError, match="tuning on the test"):
        verdict(numbers, **sides, choose_by="linear/fashion-probe/labels_per_class=50")


def test_what_was_not_run_is_named():
    numbers = aggregate([*rows(cell("simclr", 8), [50, 51]), *rows(cell("simclr", 8, **{"generate.limit": 500}), [40, 41])])
    got, found = verdict(numbers, left=cell("simclr", 8), right=cell("simclr"))
    assert got == "not judged" and "name generate.limit as well" in found.why
    left = cell("simclr", 8, **{"generate.limit": None})  # null: the cell without that axis
    got, found = verdict(numbers, left=left, right=cell("simclr"))
    assert got == "not run" and "data=real, train.method=simclr" in found.why and found.gap is None
    assert select(numbers, LINEAR, left).mean == 50.5
    with pytest.raises(Unavailable, match=r"no axis train\.colour"):
        select(numbers, LINEAR, {"train.colour": 1})
    assert "0 of them look for a difference" in summary([found])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"claims": [{"claim": "c"}]}, "claim 1 needs"),
        ({"claims": [{"claim": "c", "metric": "linear", "left": {}, "right": {}}]}, "PROTOCOL/DATASET"),
        ({"claims": [{"claim": "c", "metric": LINEAR, "left": {}, "right": {}, "exect": ">"}]}, "unknown key exect"),
        ({"claims": [{"claim": "c", "metric": LINEAR, "left": {}, "right": {}, "expect": "="}]}, "margin"),
        ({"claims": [{"claim": "c", "metric": LINEAR, "left": {}, "right": {}, "expect": ">="}]}, "one of"),
        ({"claims": [{"claim": "c", "metric": LINEAR, "left": {}}]}, "left:"),
        ({"claims": [{"claim": "c", "metric": LINEAR, "left": [{}, {}], "right": {}}]}, "choose_by"),
        ({"claims": [{"claim": "c", "metric": LINEAR, "argmax": {"over": "x"}}]}, "argmax needs"),
        ({"plots": [{"x": "generate.limit"}]}, "plot 1 needs"),
        ({"plots": [{"x": "generate.limit", "y": LINEAR, "colour": 1}]}, "unknown key colour"),
    ],
)
def test_a_bad_spec_is_one_line(spec, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        table.check(spec)
    with pytest.raises(UsageError, match=message):
        table.write([], spec, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A generation run of three captions with two images each."""
    run = tmp_path_factory.mktemp("images")
    jpeg = simplejpeg.encode_jpeg(np.zeros((32, 32, 3), np.uint8))
    write_shard(run / "shards", 0, [Sample(caption_id(t), t, [jpeg, jpeg], {}) for t in ("one", "two", "<three>")], {})
    write_json(run / "dataset.json", {"images_per_caption": 2, "shardlist": [{"url": "shards/000000.tar"}]})
    return run


@pytest.fixture(scope="module")
def sweep(images, tmp_path_factory):
    """(OUT, rows, printed lines) of a small sweep with claims, on images that are there and images that are gone."""
    random = np.random.default_rng(1)
    made = []
    for method, base in (("simclr", 40), ("stablerep", 45)):
        made += rows(cell(method), random.normal(base, 1, 3).tolist())
        for w in (2.0, 4.0, 8.0):
            where = str(images) if w == 2.0 else "/gone"
            made += rows(cell(method, w), random.normal(base + w, 0.3, 3).tolist(), images=where)
            made += rows(cell(method, w), random.normal(base, 1, 1).tolist(), "fewshot", {"way": 5, "shot": 5}, where)
    claims = [
        {"claim": "more | guidance", "paper": "62.0", "source": "table <1>", "metric": LINEAR,
         "left": cell("simclr", 8), "right": cell("simclr", 2)},
        {"claim": "not there", "metric": LINEAR, "left": cell("mae", 8), "right": cell("simclr", 2)},
    ]  # fmt: skip
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, made, table.write(made, {"claims": claims}, out, 3725)


def test_the_csv_has_every_number_unrounded(sweep):
    out, made, _ = sweep
    with open(out / "table.csv", newline="") as file:
        found = list(csv.DictReader(file))
    numbers = aggregate(made)
    assert len(found) == len(numbers) == 2 * (1 + 3 + 3)
    for line, n in zip(found, numbers, strict=True):
        assert (float(line["mean"]), float(line["low"]), float(line["high"])) == (n.mean, n.low, n.high)
        assert {k: line[k] for k in n.axes} == {k: str(v) for k, v in n.axes.items()}
        assert (line["protocol"], line["dataset"], line["metric"]) == (n.column.protocol, n.column.dataset, "top-1")
        assert {k: line[f"setting.{k}"] for k, _ in n.column.setting} == {k: str(v) for k, v in n.column.setting}
        assert int(line["seeds"]) == len(n.by_seed) and json.loads(line["train_runs"]) == n.train
        assert {int(k): v for k, v in json.loads(line["value_by_seed"]).items()} == n.by_seed
    every = {(json.dumps(r["axes"]), r["protocol"], r["seed"]): r["value"] for r in made}
    assert sorted(every.values()) == sorted(v for n in numbers for v in n.by_seed.values())


def test_the_markdown_and_what_is_printed(sweep):
    out, _, lines = sweep
    text = (out / "table.md").read_text()
    head = text.splitlines()[0]
    assert "guidance scale w" in head and "few-shot, 5-way 5-shot" in head and "†" in text
    assert text.count("**") == 2  # StableRep at w = 8, several seeds, far above all; the few-shot column has one seed
    assert re.search(r"stablerep \| 8 \|.*\*\*53\.\d \[", text)
    claims = (out / "claims.md").read_text()
    assert "more \\| guidance" in claims and "| agrees |" in claims and "| not run |" in claims
    assert "1 of them look for a difference" in claims and "about 0.1 would" in claims
    assert (
        any(line.startswith("more | guidance") and "agrees" in line for line in lines) and str(out / "report.html") in lines[-1]
    )


def test_an_axis_may_hold_lists():
    numbers = aggregate(rows({"train.crops": [2, 8], "train.method": "dino"}, [40, 41]))
    assert select(numbers, LINEAR, {"train.crops": [2, 8]}).mean == 40.5 and default_plots(numbers) == []
    assert not table.csv_text(numbers).splitlines()[1].startswith("[2, 8],")  # quoted: one field


def test_bold_needs_a_clear_interval():
    body = {w: rows(cell("simclr", w), v) for w, v in {2: [40, 41, 42], 4: [43, 44, 45], 8: [50, 51, 52]}.items()}
    assert table.best_of(aggregate([*body[2], *body[8]])).mean == 51
    assert table.best_of(aggregate([*body[2], *body[4]])) is None  # 44 [41.5, 46.5] against 41 [38.5, 43.5]
    assert table.best_of(aggregate([*body[2], *body[8][:1]])) is None
    assert table.best_of(aggregate(body[8])) is None


def test_the_page_stands_alone(sweep):
    out, _, _ = sweep
    text = (out / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|url\(", text)
    sources = re.findall(r'src="([^"]{0,22})', text)
    assert len(sources) == 1 + 3 * 2 and all(
        s.startswith(("data:image/png;base64,", "data:image/jpeg;base64")) for s in sources
    )
    assert "table &lt;1&gt;" in text and "&lt;three&gt;" in text and "1:02:05" in text and "/gone" in text
    [plot] = (out / "plots").glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG") and "generate-guidance-scale" in plot.name


def test_lines_of_a_plot_and_its_baselines(sweep):
    numbers = aggregate(sweep[1])
    [plot] = default_plots(numbers)
    assert (plot.x, plot.y, plot.baseline) == ("generate.guidance_scale", LINEAR, {"data": "real"})
    lines, names = lines_of([n for n in numbers if n.column.fits(plot.y)], plot)
    assert names == ["train.method"] and list(lines) == [("stablerep",), ("simclr",)]
    axes = draw(numbers, plot).axes[0]
    assert axes.get_xlabel() == "guidance scale w" and axes.get_ylabel() == "top-1 (%)"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["stablerep", "simclr", "real, same colour"]
    level = {round(line.get_ydata()[0], 6) for line in axes.lines if line.get_linestyle() == "--" and len(line.get_ydata())}
    assert level == {round(n.mean, 6) for n in numbers if n.axes["data"] == "real"}


def test_default_plots_keep_parts_of_a_grid_apart():
    made = [r for w in (2, 4, 8) for r in rows(cell("simclr", w), [40, 41])]
    made += [r for limit in (250, 500, 1000) for r in rows(cell("simclr", 2, **{"generate.limit": limit}), [30, 31])]
    made += [*rows(cell("simclr"), [42, 43]), *rows(cell("mae"), [20, 21])]
    numbers = aggregate(made)
    guidance, limits = default_plots(numbers)
    assert guidance.where == {"generate.limit": None} and limits.where == {}
    for plot, count in ((guidance, 3), (limits, 3)):
        lines, names = lines_of(numbers, plot)
        assert names == [] and [len(line) for line in lines.values()] == [count]
        axes = draw(numbers, plot).axes[0]
        level = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
        assert level == [42.5]  # MAE is not among the lines


def test_captions_stand_on_a_log_axis_and_empty_plots_are_said(tmp_path):
    made = [r for limit in (250, 500, 2000) for r in rows({"train.method": "simclr", "generate.limit": limit}, [40, 41])]
    spec = {"plots": [{"x": "generate.limit", "y": LINEAR}, {"x": "train.steps", "y": LINEAR}]}
    [plot, _] = read_plots(spec)
    axes = draw(aggregate(made), plot).axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "number of captions (log scale)"
    lines = table.write(made, spec, tmp_path)
    assert any("against train.steps: no cell has both" in line for line in lines) and len(list(tmp_path.glob("plots/*"))) == 1
    assert not (tmp_path / "claims.md").exists()
    table.write([], {}, tmp_path)  # nothing yet: no numbers, no plots, and no crash
    assert not list(tmp_path.glob("plots/*"))


def test_a_terminal_gets_a_drawn_table(monkeypatch):
    head, body = ("claim", "verdict"), [[Cell("[bold] is no markup"), Cell("agrees", True)]]
    plain = text_table(head, body)
    assert plain == ["claim                verdict", "[bold] is no markup  agrees *"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    drawn = "\n".join(text_table(head, body))
    assert "[bold] is no markup" in drawn and "┃" in drawn
