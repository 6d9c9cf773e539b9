"""The report of a comparison: its numbers, and that it is whole, safe and the same for any content."""

import copy
import importlib.util
import math
import re
from html.parser import HTMLParser

import pytest

from zofo.compare.page import page

VOID = {"meta", "br", "input", "link", "img", "hr"}
TAGGED = "<script>alert('&')</script>"


def method(name, difference=None, **changes):
    values = {
        "name": name,
        "mean": 0.8431,
        "low": 0.8112,
        "high": 0.8754,
        "scores": {"seed 0": 0.8317, "seed 1": 0.8545},
        "difference": difference,
        "cost": {"steps": 1234, "forward_equivalents": 56789.0, "seconds": 95.0, "peak_bytes": 1.5 * 2**30},
        "batch": 16,
        "curve": [
            {"forward_equivalents": 0.0, "seconds": 0.0, "loss": 0.7, "score": 0.5},
            {"forward_equivalents": 56789.0, "seconds": 95.0, "loss": 0.4, "score": 0.8},
        ],
        "templates": [0.8431, 0.7211],
        "adapted": {
            "shots": 16,
            "draws": 2,
            "zero_shot": 0.41,
            "in_context": 0.5,
            "mean": 0.6125,
            "worst": 0.55,
            "low": 0.58,
            "high": 0.64,
            "gain": {"difference": 0.0371, "low": 0.0122, "high": 0.0633},
            "tasks": [
                {
                    "name": "held",
                    "metric": "accuracy",
                    "zero_shot": 0.412,
                    "in_context": 0.5011,
                    "mean": 0.6125,
                    "worst": 0.55,
                    "low": None,
                    "high": None,
                    "gain": None,
                }
            ],
        },
        "forgetting": {"task": "sst2", "before": 0.9123, "after": 0.8876, "changes": [-0.0312, -0.0182]},
        "diagnosis": {
            "signal_to_noise": 1.234,
            "cosine": 0.00051,
            "expected_cosine": 0.00032,
            "penalty_gap": None,
            "backbone_gain": 0.0123,
            "adapter_gain": 0.2345,
        },
        "search": [
            {"settings": {"learning_rate": 3e-4}, "score": 0.7777, "loss": 0.4567, "chosen": True},
            {"settings": {"zo_eps": 1e-3}, "score": 0.6666, "loss": 0.5678, "chosen": False},
        ],
        "commands": [f"zofo train --method {name}"],
    }
    return {**values, **changes}


def difference(value=0.0415, significant=True):
    reach = 0.0201 if significant else 1.0
    return {
        "difference": value,
        "low": value - reach,
        "high": value + reach,
        "p": 0.0031,
        "p_holm": 0.0123 if significant else 0.4567,
        "detectable": 0.0392,
        "significant": significant,
        "seed_sd": 0.0161,
    }


def content(*methods, **changes):
    task = {
        "name": "rte",
        "metric": "accuracy",
        "rows": 1277,
        "clusters": 1277,
        "seeds": [0, 1],
        "template": 0,
        "sentence": "Significantly better than mezo: lora.",
        "gains": ["lora, adapted to held from 16 rows: +3.7 points over mezo (95 % interval +1.2 to +6.3)."],
        "verdicts": ["lora is significantly better than mezo on rte"],
        "methods": list(methods),
        "failed": [],
        **changes,
    }
    return {
        "title": "Two methods",
        "baseline": "mezo",
        "machine": {"cores": 2},
        "versions": {"torch": "2.13.0"},
        "notes": ["one run was reused"],
        "plan": "methods:\n  lora: {}\n",
        "tasks": [task],
    }


@pytest.fixture
def report():
    return content(method("mezo"), method("lora", difference()), method("prefix", difference(-0.01, significant=False)))


class Reader(HTMLParser):
    """Text, table rows, attributes and ids of a page; fails where tags are not balanced."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.rows, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def figure_count(html):
    return html.count("<svg ")


def test_the_numbers_are_those_of_the_report(report):
    rows = Reader(page(report)).rows
    assert [
        "lora significantly better",
        "84.3 81.1 to 87.5",
        "+4.2 2.1 to 6.2",
        "0.012",
        "3.9",
        "1.6",
        "1,234 of 16 rows",
        "56,789",
        "1 min 35 s",
        "1.5 GiB",
    ] in rows
    assert [
        "mezo baseline",
        "84.3 81.1 to 87.5",
        *"––––",
        "1,234 of 16 rows",
        "56,789",
        "1 min 35 s",
        "1.5 GiB",
    ] in rows
    assert ["lora", "sst2", "91.2", "88.8", "-2.5 -3.1 to -1.8"] in rows  # forgetting
    assert ["lora", "held", "41.2", "50.1", "61.3", "55.0", ""] in rows  # adapted to a held-back task, in one draw
    assert not [row for row in rows if row[:2] == ["lora", "mean"]]  # of one task
    assert ["lora", "84.3", "72.1", "12.2"] in rows  # templates
    assert ["lora", "1.2", "0.00051", "0.00032", "–", "+1.2", "+23.4"] in rows  # diagnosis
    assert ["lora", "83.2", "85.5"] in rows  # seeds
    assert ["chosen", "0.0003", "–", "77.8", "0.457"] in rows
    assert ["2", "–", "0.001", "66.7", "0.568"] in rows


def test_of_several_held_back_tasks_the_mean_is_shown_as_well(report):
    for one in report["tasks"][0]["methods"]:
        one["adapted"]["tasks"] *= 2
    shown = Reader(page(report))
    assert ["lora", "mean", "41.0", "50.0", "61.3 58.0 to 64.0", "55.0", "+3.7 +1.2 to +6.3"] in shown.rows
    assert "lora, adapted to held from 16 rows: +3.7 points over mezo" in "".join(shown.text)


def test_long_names_that_begin_alike_differ_in_the_figure(report):
    adapted = report["tasks"][0]["methods"][0]["adapted"]
    gain = {"difference": 0.03, "low": 0.01, "high": 0.06}
    names = ("tweet_eval-irony", "tweet_eval-sentiment")
    adapted["tasks"] = [{**adapted["tasks"][0], "name": name, "gain": gain} for name in names]
    labels = re.search(r"<svg [^>]*after adapting.*?</svg>", page(report), re.DOTALL)[0]
    assert "_eval-irony<" in labels
    assert "-sentiment<" in labels


def test_everything_that_the_report_says_is_on_the_page(report):
    report["tasks"][0].update(clusters=120, failed=[{"name": "ia3", "seed": 1, "message": "loss is not finite"}])
    text = " ".join("".join(Reader(page(report)).text).split())
    for words in (
        "Two methods",
        "rte: Significantly better than mezo: lora.",
        "lora is significantly better than mezo on rte",
        "accuracy of 1,277 test rows from 120 sources; seeds 0, 1; template 0",
        "one run was reused",
        "ia3, seed 1: loss is not finite",
        "zofo train --method lora",
        "methods: lora: {}",
        "2.13.0",
    ):
        assert words in text


def test_only_significant_differences_are_marked(report):
    html = page(report)
    assert html.count("significantly better</span>") == html.count('<tr class="won">') == 1
    assert "significantly worse</span>" not in html
    report["tasks"][0]["methods"][1]["difference"] = difference(-0.04)
    html = page(report)
    assert html.count("significantly worse</span>") == 1
    assert '<tr class="won">' not in html


def test_the_differences_are_drawn_to_scale(report):
    """Ticks and intervals of the figure give the numbers of the report back."""
    svg = re.search(r"<svg [^>]*differences.*?</svg>", page(report), re.DOTALL)[0]
    ticks = re.findall(
        r'<use href="[^"]*" x="([\d.]+)"[^>]*/>\s*</g>\s*</g>\s*<g id="[^"]*">\s*<text[^>]*>([−\d]+)<', svg
    )
    (x0, first), *_, (x1, last) = [(float(x), float(label.replace("−", "-"))) for x, label in ticks]
    lines = re.findall(
        r'd="M ([\d.]+) [\d.]+\s+L ([\d.]+) [\d.]+\s*"[^>]*stroke: var\(--series-0\); stroke-width: 2"', svg
    )
    drawn = [first + (float(x) - x0) * (last - first) / (x1 - x0) for x in lines[0]]
    assert drawn == pytest.approx([2.14, 6.16], abs=1e-3)


def test_the_page_needs_nothing_else(report):
    html = page(report)
    assert figure_count(html) == 9  # differences, three scores, two curves, three costs
    assert "://" not in html
    assert "@import" not in html
    assert "<script" not in html
    read = Reader(html)
    assert "src" not in {key for _, key, _ in read.attributes}
    assert all(value.startswith("#") for value in read.values("href"))
    assert re.findall(r"url\((?!#)", html) == []


def test_ids_differ_and_every_reference_has_its_id(report):
    report["tasks"].append(copy.deepcopy(report["tasks"][0]))
    html = page(report)
    ids = Reader(html).values("id")
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert {one or other for one, other in referred} <= set(ids)


def test_colours_are_those_of_the_page(report):
    """A colour that is fixed in a figure would be unreadable in the light or in the dark."""
    html = page(report)
    assert re.findall(r'style="[^"]*(?:#[0-9a-f]{3,6}|rgb)', html) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    for scheme in re.findall(r":root \{(.*?)\}", html, re.DOTALL):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))


@pytest.mark.parametrize(
    "name", [TAGGED, 'a" onload="x', "$\\frac$", "名前 😀", "line\nbreak\x00\x1b", "x" * 300, "\ud800", "{{ 1 }}"]
)
def test_odd_names_are_text(name):
    report = content(
        method(name, search=[{"settings": {name: name}, "score": 0.5, "loss": 0.5, "chosen": True}], commands=[name]),
        method("other", difference(), forgetting={"task": name, "before": 0.5, "after": 0.5, "changes": [0.0]}),
        name=name,
        metric=name,
        sentence=name,
        failed=[{"name": name, "seed": 0, "message": name}],
    )
    report.update(title=name, baseline=name, plan=name, notes=[name], machine={name: name}, versions={name: name})
    html = page(report)
    html.encode("utf-8")
    read = Reader(html)
    assert "<script" not in html
    assert not {"onload"} & {key for _, key, _ in read.attributes}
    assert figure_count(html) == 9
    seen = name.encode("utf-8", "replace").decode()
    assert "".join(read.text).count(seen) >= 15


def unknown(value):
    """The same content without a single number that was measured."""
    if isinstance(value, dict):
        return {key: one if key == "settings" else unknown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [unknown(one) for one in value]
    return value if isinstance(value, str | bool | int | None) else math.nan


def changed(**changes):
    return content(method("mezo"), method("lora", difference(), **changes))


FAILED = [{"name": "lora", "seed": 0, "message": "out of memory"}]
EMPTY = {"scores": {}, "curve": [], "adapted": None, "forgetting": None, "search": [], "commands": []}
NO_COST = {"steps": 0, "forward_equivalents": 0.0, "seconds": 0.0, "peak_bytes": 0.0}
UNTRAINED = {**NO_COST, "seconds": None, "peak_bytes": None}
DEGENERATE = {
    "a single method": (content(method("mezo")), 8),
    "one seed": (content(method("mezo"), method("lora", {**difference(), "seed_sd": None}), seeds=[0]), 9),
    "only failures": (content(failed=FAILED, sentence="", seeds=[]), 0),
    "no tasks": ({**content(), "tasks": []}, 0),
    "empty lists": (content(method("mezo", **EMPTY), method("lora", difference(), **EMPTY)), 7),
    "another baseline": ({**changed(), "baseline": "gone"}, 9),
    "no cost": (content(method("mezo", cost=NO_COST, curve=[])), 6),
    "without training": (content(method("mezo"), method("zero-shot", difference(), cost=UNTRAINED, curve=[])), 9),
    "no number is known": (
        content(method("mezo"), unknown(method("lora", difference()))),
        8,
    ),
    "infinite": (changed(curve=[{"forward_equivalents": 1.0, "seconds": 1.0, "loss": math.inf, "score": math.nan}]), 9),
    "diverged": (changed(curve=[{"forward_equivalents": 1.0, "seconds": 1.0, "loss": 1e9, "score": 0.5}]), 9),
    "cannot be seen": (content(method("mezo"), method("lora", {**difference(), "detectable": math.inf})), 9),
    "null": (content(method("mezo"), method("lora", {**difference(), "detectable": None}, mean=None)), 9),
    "many methods": (content(*[method(f"m{number}", difference()) for number in range(41)]), 9),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_missing_values_do_not_break_the_page(name):
    report, figures = DEGENERATE[name]
    html = page(report)
    read = Reader(html)
    assert figure_count(html) == figures
    text = "".join(read.text).lower()
    assert not re.search(r"\b(nan|inf|none)\b", text)


def test_a_single_method_and_a_failed_task_are_named_as_such():
    assert "No run of this task has finished." in page(content(failed=FAILED, sentence=""))
    assert "out of memory" in page(content(failed=FAILED, sentence=""))
    assert "no comparison" in page(content(method("mezo"), sentence=""))


def test_the_page_is_the_same_each_time(report):
    assert page(report) == page(copy.deepcopy(report))


def test_without_matplotlib_the_page_has_no_figures_and_says_so(report, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    html = page(report)
    Reader(html)
    assert figure_count(html) == 0
    assert "matplotlib is not installed" in html
    assert "84.3" in html
