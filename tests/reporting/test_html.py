# ruff: noqa: RUF001  (reports use real multiplication and minus signs)
from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from passdeploy.errors import BadInput
from passdeploy.reporting.comparison import render_comparison
from passdeploy.reporting.files import parse_report
from passdeploy.reporting.history import history, render_history
from passdeploy.reporting.html import render_html
from tests.reporting.variants import STATUSES, data, runs, variant

VOID = {"meta", "link", "img", "br", "hr", "input"}
CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
]
EVIL = "<script>alert(1)</script>\"'&|`*_"


class Outline(HTMLParser):
    """Fails on tags that are not closed in order; collects what could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def pages() -> dict[str, str]:
    result = {status: render_html(variant(status)) for status in STATUSES}
    return result | {"comparison": render_comparison(runs()), "history": render_history(history(runs()))}


@pytest.mark.parametrize(("name", "page"), pages().items())
def test_pages_are_well_formed_and_load_nothing(name: str, page: str) -> None:
    found = outline(page)
    assert "script" not in found.tags
    assert not [link for link in found.links if not link.startswith(("data:", "1.5x/", "3x/"))]
    assert not re.search(r"url\(|@import|https?://", page)
    assert "nan" not in re.findall(r"[\w.]+", re.sub(r"base64,[^\"]*", "", page)), "a coordinate is not a number"


@pytest.mark.parametrize(("name", "page"), pages().items())
def test_figures_are_valid_svg_with_a_description(name: str, page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert figures
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("aria-label") or root.get("aria-hidden") or len(root.findall(".//path")) == len(list(root))
        for element in root.iter():
            for key in ("width", "height", "r"):
                value = element.get(key)
                assert value is None or not value.startswith("-"), f"negative {key} in {name}"


def test_the_page_has_every_section_of_the_report() -> None:
    page = render_html(variant("within_budget"))
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Accuracy and latency",
        "Latency per call",
        "What was kept",
        "Closing the loop on the measured engine",
        "The learnt prompt",
        "Search and fine-tuning",
        "Proof: every step computes the same function",
        "The numbers",
        "Why not faster",
        "What else could be done",
        "All budgets of this search",
        "How to reproduce it",
    ]
    for shown in (
        "2.05 to 2.08",
        "9b1d7c5e0f2a",
        "passdeploy run --model resnet20",
        "3 of 6 blocks are left",
        "1.9e-06",
        "1 not prunable",
    ):
        assert shown in page


def test_unverified_says_plainly_that_nothing_was_measured() -> None:
    page = render_html(variant("unverified"))
    assert "Nothing was measured: NVIDIA A100 is not attached" in page
    assert "MACs, not latency: nothing was measured." in page
    assert "Speed-up, measured" not in page
    assert "Latency per call" not in page


def test_a_time_of_something_else_makes_no_figure_over_latency() -> None:
    """As where the proof failed, so that only the dense network in int8 was measured."""
    d = variant("not_equivalent").to_json()
    point = {"label": "dense", "kind": "dense", "accuracy": 0.93, "latency_ms": None, "macs": 4e7}
    d["accuracy_points"] = [
        point,
        point | {"label": "pruned", "kind": "pruned", "macs": 2e7},
        point | {"label": "dense int8", "kind": "alternative", "latency_ms": 0.2},
    ]
    page = render_html(parse_report(d))
    assert "MACs per image" in page and "<h2>Accuracy and MACs</h2>" in page


def test_an_infeasible_run_that_measured_does_not_say_that_nothing_was() -> None:
    page = render_html(variant("infeasible"))
    assert "not measured" not in page and "nothing was measured" not in page.lower()
    assert "no network of this run meets the budget" in page
    assert "predicted latency (a model of measured engines)" in page
    assert "the encircled one is the fastest" in page, "none was taken"


@pytest.mark.parametrize(("asked", "shown"), [("2x", False), ("290us", True)])
def test_a_speed_up_at_p99_has_no_time_to_be_held_against(asked: str, shown: bool) -> None:
    d = data()
    d["budget"] |= {"asked": asked, "percentile": "p99", "latency_ms": 0.29}
    page = render_html(parse_report(d))
    assert ("budget 290 µs" in page) is shown
    assert ("the tinted part is inside the budget" in page) is shown


def test_what_users_name_cannot_become_markup() -> None:
    d = data()
    d["provenance"].update(model=EVIL, command=EVIL, engine=EVIL)
    d["messages"] = [EVIL]
    d["groups"][0]["name"] = d["groups"][1]["members"][0] = d["health"][0]["message"] = EVIL
    d["accuracy_points"][3]["label"] = d["why_not_faster"][0]["text"] = d["environment"]["cpu"] = EVIL
    d["budgets"][0]["path"] = d["curves"]["search"]["unit"] = EVIL
    d["curves"]["search"]["series"][EVIL] = d["curves"]["search"]["series"]["loss"]
    page = render_html(parse_report(d))
    assert "script" not in outline(page).tags
    assert page.count("&lt;script&gt;") >= 10


@pytest.mark.parametrize(
    "path",
    ["javascript:alert(1)", "/etc/passwd", "https://example.com/", "", " //example.com/", r"\\example.com/", r"a\b"],
)
def test_a_link_to_another_budget_stays_inside_the_run(path: str) -> None:
    d = data()
    d["budgets"][0]["path"] = path
    with pytest.raises(BadInput, match=r"budgets\.0\.path"):
        parse_report(d)


def test_a_report_without_optional_sections_is_a_page_too() -> None:
    d = {key: value for key, value in data().items() if key in list(data())[:13]}
    page = render_html(parse_report(d))
    outline(page)
    assert "What was kept" not in page
    assert "2.07× faster" in page


def test_large_networks_fit() -> None:
    d = data()
    d["groups"] = []
    for i in range(160):
        d["groups"].append(
            {"name": f"g{i}", "kind": "channel", "units": 64 + i, "kept": 8 + i % 5, "members": [f"m{i}"]}
        )
        if i % 3 == 0:
            block = {"name": f"depth:b{i}", "kind": "depth", "units": 1, "kept": i % 2, "members": [f"m{i}", f"n{i}"]}
            d["groups"].append(block)
    d["candidates"] = [{"predicted_ratio": 0.5, "measured_ratio": 0.51 + i / 100} for i in range(40)]
    page = render_html(parse_report(d))
    outline(page)
    assert len(page) < 400_000


def test_no_bar_is_longer_than_its_track() -> None:
    """Nor where a part of the pruned engine takes longer than any of the dense one."""
    d = data() | {"layers": [{"name": "conv1", "dense_ms": 0.2, "pruned_ms": 0.3}]}
    widths = re.findall(r'width="([\d.]+)%" height="44%"', render_html(parse_report(d)))
    assert widths == ["66.67", "100.00"]


def test_the_page_stays_small() -> None:
    assert len(render_html(variant("within_budget")).encode()) < 120_000


def chromium(arguments: list[str], page: Path, profile: Path) -> bytes:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("name", ["within_budget", "comparison"])
@pytest.mark.parametrize("width", [400, 1280])
def test_pages_fit_the_screen_in_chromium(name: str, width: int, tmp_path: Path) -> None:
    """No sideways scrolling: the laid-out page is as wide as the window."""
    page = tmp_path / "page.html"
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    page.write_text(pages()[name].replace("</body>", probe + "</body>"))
    dom = chromium([f"--window-size={width},900", "--dump-dom"], page, tmp_path / "profile").decode()
    title = re.search(r"<title>(\d+) of (\d+)</title>", dom)
    assert title is not None
    assert int(title[1]) <= int(title[2])


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_light_and_dark_differ_in_chromium(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(variant("within_budget")))
    brightness = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        arguments = [
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
            "--window-size=1280,1600",
        ]
        chromium(arguments, page, tmp_path / f"profile{scheme}")
        image = Image.open(shot).convert("L")
        assert len(image.getcolors(256) or []) > 50, "an empty page"
        brightness.append(sum(image.resize((32, 32)).tobytes()) / 32**2)
    assert brightness[0] < 80
    assert brightness[1] > 190
