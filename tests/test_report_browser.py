"""The report in a real browser: numbers read back, tables that sort, phone width, print, nothing from elsewhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
import pytest
from fake_run import ROWS, make_run, watch, write_json
from test_report import controlled, grouped_rows, segmented, with_sights
from test_report_compare import make as make_comparison
from test_report_side import seeded

from explora.reporting import write_leaderboard, write_report, write_side
from explora.reporting.rows import Row, gather

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")

READ = """
const page = document.documentElement, text = node => node.textContent.trim().replace(/\\s+/g, " ");
const table = name => [...document.querySelectorAll(`${name} tbody tr`)].map(row => [...row.cells].map(cell =>
  cell.dataset.value ?? text(cell)));
const column = (name, place) => table(name).map(row => row[place]);
const click = (name, place) => document.querySelectorAll(`${name} th button`)[place].click();
const read = () => {
  const told = {heading: text(document.querySelector("h1")), width: innerWidth,
    wide: page.scrollWidth, results: table("#results"), groups: table(".groups"), moved: table(".moved"),
    loaded: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    broken: [...document.images].filter(image => !image.naturalWidth).length, images: document.images.length};
  click("#results", 4); told.downward = column("#results", 4);
  click("#results", 4); told.upward = column("#results", 4);
  click("#results", 7); told.differences = column("#results", 7);
  return told;
};
"""
"""Run in the page itself, as a reader's clicks are."""


FIT = """
const paper = location.hash === "#paper";
for (const sheet of paper ? document.styleSheets : []) for (const rule of sheet.cssRules)
  if (rule.media?.mediaText === "print") rule.media.mediaText = "all";
const cut = [...document.querySelectorAll(".wide, .scroll")].filter(box => box.scrollWidth > box.clientWidth);
const shown = paper ? cut.map(box => `${box.scrollWidth}: ${box.textContent.slice(0, 40)}`) : [];
const key = document.title + location.hash, wide = document.body.scrollWidth;
parent.postMessage({key, wide, width: innerWidth, cut: shown}, "*");
"""
"""Whether all is inside the width of a telephone, or, with the rules for print turned on, of paper."""
PHONE, PAPER = 390, 657  # A4 less two margins of 18 mm


class Seen(NamedTuple):
    """What the browser made of the page: what `READ` tells, and its files."""

    told: dict[str, Any]
    screenshot: np.ndarray
    folder: Path


def browse(page: Path, folder: Path, width: int, height: int, *options: str) -> tuple[str, np.ndarray]:
    """The DOM after all scripts, and a screenshot (height, width, 4)."""
    shot = folder / "shot.png"
    window = [f"--window-size={width},{height}", "--hide-scrollbars", "--virtual-time-budget=3000"]
    plain = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    words = [str(BROWSER), *plain, *window, "--dump-dom", f"--screenshot={shot}", *options, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, matplotlib.image.imread(shot)


def told(dom: str) -> dict[str, Any]:
    found = re.search(r'<pre id="told"[^>]*>(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    content: dict[str, Any] = json.loads(html.unescape(found[1]))
    return content


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has all that a page can show."""
    rows = [*grouped_rows(), *controlled(54.0, (4.0, 1.0, 7.0)), *segmented()]
    run = with_sights(watch(make_run(tmp_path_factory.mktemp("browsed") / "run", rows=rows)))
    write_json(run / "shards/control/manifest.json", {"name": "streets", "samples": 100})
    write_report(run)
    return run


@pytest.fixture(scope="module")
def desk(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The page at 1200 pixels, and printed."""
    folder, text = tmp_path_factory.mktemp("desk"), (run / "report.html").read_text(encoding="utf-8")
    tell = "document.body.append(Object.assign(document.createElement('pre'), {id: 'told', textContent: %s}))"
    script = f"<script>{READ}{tell % 'JSON.stringify(read())'}</script></body>"
    page = write(folder / "page.html", text.replace("</body>", script))
    dom, screenshot = browse(page, folder, 1200, 2000, f"--print-to-pdf={folder / 'page.pdf'}")
    return Seen(told(dom), screenshot, folder)


@pytest.fixture(scope="module")
def phone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The page at 390 pixels, in a frame, as no window is that narrow."""
    folder, text = tmp_path_factory.mktemp("phone"), (run / "report.html").read_text(encoding="utf-8")
    script = f"<script>{READ}parent.postMessage(JSON.stringify(read()), '*')</script></body>"
    write(folder / "page.html", text.replace("</body>", script))
    listen = "addEventListener('message', event => { document.querySelector('pre').textContent = event.data })"
    frame = '<iframe src="page.html" style="border: 0; width: 390px; height: 2000px"></iframe>'
    around = (
        f'<!doctype html><body style="margin: 0"><pre id="told" hidden></pre><script>{listen}</script>{frame}</body>'
    )
    dom, screenshot = browse(write(folder / "frame.html", f"<!doctype html>{around}"), folder, 500, 2000)
    return Seen(told(dom), screenshot[:, :390], folder)


@pytest.fixture(scope="module")
def fits(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `FIT` tells of each kind of page, by its file's name and whether on a phone or on paper."""
    folder = tmp_path_factory.mktemp("fits")
    runs = [run, *(seeded(folder / f"seed{seed}", seed) for seed in range(3))]
    pages = {
        "report": run / "report.html",
        "side": write_side(runs, folder / "side.html"),
        "compare": write_leaderboard(make_comparison(folder / "grid")),
    }
    frames = []
    for name, page in pages.items():
        text = re.sub("<title>.*?</title>", f"<title>{name}</title>", page.read_text(encoding="utf-8"), count=1)
        write(folder / f"{name}.html", text.replace("</body>", f"<script>{FIT}</script></body>"))
        for where, width in (("phone", PHONE), ("paper", PAPER)):
            frames.append(f'<iframe src="{name}.html#{where}" style="border: 0; width: {width}px"></iframe>')
    listen = "addEventListener('message', ({data}) => { all[data.key] = data; told.textContent = JSON.stringify(all) })"
    script = f"<script>const all = {{}}, told = document.querySelector('pre'); {listen}</script>"
    around = f'<!doctype html><body><pre id="told" hidden></pre>{script}{"".join(frames)}</body>'
    return told(browse(write(folder / "frames.html", around), folder, 800, 600)[0])


@pytest.mark.parametrize("page", ["report", "side", "compare"])
def test_pages_fit_phones_and_paper(page: str, fits: dict[str, dict[str, Any]]) -> None:
    phone, paper = (fits[f"{page}#{where}"] for where in ("phone", "paper"))
    assert (phone["width"], paper["width"]) == (PHONE, PAPER)
    assert phone["wide"] <= PHONE
    assert paper["wide"] <= PAPER
    assert paper["cut"] == []


def test_the_numbers_are_those_of_the_results(run: Path, desk: Seen) -> None:
    lines = (run / "probe" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = gather(Row.of(json.loads(line)) for line in lines)
    rows = found.rows
    assert len(desk.told["results"]) == len(rows) == len(ROWS) + 4
    for cells, row in zip(desk.told["results"], rows, strict=True):
        assert cells[:4] == [row.data, str(found.models.index(row.model)), row.evaluator, row.metric]
        expected = [row.value, row.low, row.high, row.difference, row.difference_low, row.difference_high, row.n]
        assert [float(cell) if cell else None for cell in cells[4:]] == expected
    assert desk.told["heading"] == "Adaptation raised accuracy on ucmerced by 3.3 points."
    assert desk.told["moved"][0] == ["adapted", "0.108", "0.892", "0.030", "0.970", "0.125"]
    assert desk.told["groups"][1] == ["<Africa>", "40", "50.0", "53.0"]


def test_tables_sort(desk: Seen) -> None:
    values = [float(value) for value in desk.told["upward"]]
    assert values == sorted(values)
    assert desk.told["downward"] == desk.told["upward"][::-1]
    measured = [float(value) for value in desk.told["differences"] if value]
    assert measured == sorted(measured, reverse=True)
    blank = desk.told["differences"].count("")
    assert desk.told["differences"][-blank:] == [""] * blank


@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_and_is_not_blank(width: int, request: pytest.FixtureRequest) -> None:
    seen: Seen = request.getfixturevalue("desk" if width == 1200 else "phone")
    assert seen.told["width"] == width
    assert seen.told["wide"] <= width
    assert seen.told["broken"] == 0
    assert seen.told["images"] == 4 * (1 + 3 + 3) + 6 * 3
    assert seen.screenshot.shape[:2] == (2000, width)
    ink = (seen.screenshot[..., :3].mean(-1) < 0.5).mean(1)
    assert (ink > 0).mean() > 0.2  # rows of pixels with letters or figures in them
    assert (ink.reshape(10, -1).max(1) > 0).all()  # and in every tenth of the page


def test_nothing_comes_from_elsewhere(run: Path, desk: Seen, phone: Seen) -> None:
    assert desk.told["loaded"] == phone.told["loaded"] == []
    assert (run / "report.html").stat().st_size < 5e6


def test_it_prints(desk: Seen) -> None:
    pdf = (desk.folder / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 5
