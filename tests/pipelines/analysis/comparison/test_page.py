"""The page: its numbers are those of the run folders, nothing in a name breaks it, and a browser draws it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pipelines.analysis.comparison import report as report_module
from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.report import render_page, write_report
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

HOSTILE = "</script><img src=x onerror=document.title='owned'>{{ 7 * 7 }}%{y}"
FINALS = {"asgo": (3.01, 3.02, 3.04), "adamw": (3.21, 3.2, 3.26)}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

ACTIONS = """
addEventListener("load", async () => {
  const place = document.getElementById("curves");
  const wait = () => new Promise((resolve) => setTimeout(resolve, 500));
  const look = () => ({
    title: place._fullLayout.xaxis.title.text,
    range: [...place._fullLayout.xaxis.range],
    ends: place.data.filter((trace) => trace.visible === true && trace.customdata).map((trace) => trace.x.at(-1)),
    names: [...place.querySelectorAll(".legendtext")].map((text) => text.textContent),
  });
  const seen = { first: look() };
  for (const chosen of ["tokens", "seconds", "half"]) {
    document.querySelector(`input[value=${chosen}]`).click();
    await wait();
    seen[chosen] = look();
  }
  for (const name of ["val", "train", "runs"]) document.querySelector(`input[name=${name}]`).click();
  await wait();
  seen.runs = look();
  place.emit("plotly_legendclick", { curveNumber: 0, data: place.data });
  await wait();
  seen.hidden = place.data.filter((trace) => trace.visible === true && trace.customdata).map((trace) => trace.name);
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
"""


class Text(HTMLParser):
    """Table cells, scripts and image sources of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self.images: list[str] = []
        self._into: list[str] | None = None
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._into = {"td": self.cells, "script": self.scripts}.get(tag, self._into)
        if tag in ("td", "script") and self._into is not None:
            self._into.append("")
        if tag == "img":
            self.images.append(str(dict(attributes).get("src")))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "script"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two optimizers with three seeds each, and a diverged run of a bad name."""
    folder = tmp_path_factory.mktemp("runs")
    for optimizer, finals in FINALS.items():
        for seed, final in enumerate(finals):
            train = (final + 2 / np.sqrt(np.arange(1, 161))).tolist()
            write_run(folder / f"{optimizer}-s{seed}", falling_to(final), train, optimizer=optimizer, seed=seed)
    write_run(folder / HOSTILE, {0: 5.0, 80: 5.5, 160: 6.0}, [5.0] * 160, optimizer="asgo", seed=9)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of these runs."""
    return write_report(compare_runs([runs]), tmp_path_factory.mktemp("made") / "report", f"asgo compare {HOSTILE}")


def curves_in(page: Path) -> Any:
    """What the page's script draws."""
    return json.loads(Text(page.read_text(encoding="utf-8")).scripts[0])


def raw_losses(run: Path, split: str) -> list[tuple[int, float]]:
    """Steps and losses as they stand in the metrics file."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["split"] == split]


def test_the_numbers_are_those_of_the_run_folders(runs: Path, page: Path) -> None:
    cells = Text(page.read_text(encoding="utf-8")).cells
    for optimizer in FINALS:
        finals = [raw_losses(runs / f"{optimizer}-s{seed}", "val")[-1][1] for seed in range(3)]
        half = np.std(finals, ddof=1) / np.sqrt(3) * scipy.stats.t.ppf(0.975, 2)
        assert f"{np.mean(finals):.4f} ± {half:.4f}" in cells
        assert f"{min(finals):.4f}" in cells
    low, high = scipy.stats.ttest_rel(FINALS["asgo"], FINALS["adamw"]).confidence_interval()
    difference = np.mean(FINALS["asgo"]) - np.mean(FINALS["adamw"])
    assert f"{difference:+.4f}".replace("-", "−") in cells
    assert f"asgo minus adamw: {difference:+.4f}, {low:+.4f} to {high:+.4f}" in page.read_text(encoding="utf-8")


def test_the_curves_are_those_of_the_run_folders(runs: Path, page: Path) -> None:
    asgo, adamw = curves_in(page)["contenders"]
    assert (asgo["label"], adamw["label"]) == ("asgo", "adamw")
    losses = np.array([[loss for _, loss in raw_losses(runs / f"adamw-s{seed}", "val")] for seed in range(3)])
    assert adamw["val"]["steps"] == [0, 80, 160]
    assert adamw["val"]["tokens"] == [0, 80 * 16 * 128, 160 * 16 * 128]
    assert adamw["val"]["seconds"] == [0, 40, 80]
    np.testing.assert_allclose(adamw["val"]["mean"], losses.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(adamw["val"]["lowest"], losses.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(adamw["val"]["highest"], losses.max(axis=0), rtol=1e-6)
    (single,) = [run for run in adamw["runs"] if run["name"] == "adamw-s1"]
    steps, train = zip(*raw_losses(runs / "adamw-s1", "train"), strict=True)
    assert single["train"]["steps"] == list(steps)
    np.testing.assert_allclose(single["train"]["losses"], train, rtol=1e-6)


def test_the_page_says_which_test_was_made_and_which_pairs(runs: Path, page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert "The test is paired, on the differences by seed, if both have the same seeds" in content
    assert "paired" in Text(content).cells
    assert 'alt="Differences of the final validation losses with' in content
    against = Text(render_page(compare_runs([runs], against="adamw"), {}, [], []))
    matrix = against.cells[against.cells.index("−0.2000") :]
    assert matrix[:2] == ["−0.2000", ""]  # asgo, and adamw itself, in one column


def test_a_name_cannot_break_the_page(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    read = Text(content)
    assert HOSTILE in read.cells
    assert f"asgo compare {html.escape(HOSTILE)}".replace("&#x27;", "&#39;") in content
    assert len(read.scripts) == 3
    assert all(image.startswith("data:image/png;base64,") for image in read.images)
    names = [run["name"] for contender in curves_in(page)["contenders"] for run in contender["runs"]]
    assert html.escape(HOSTILE) in names  # plotly turns it back


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in content
    assert not re.findall(r"<(?:script|link|iframe|object)[^>]+(?:src|href|data)=", content)


def test_one_run_and_nothing_finished_have_pages_too(tmp_path: Path) -> None:
    write_run(tmp_path / "half", {0: 5.0, 80: 4.0}, [5.0] * 90)
    content = render_page(compare_runs([tmp_path]), {}, [], [])
    assert "No run has finished: there is no final loss to compare." in content
    assert 'class="matrix' not in content
    assert "at step 90 of 160" in content


def test_a_page_of_many_runs_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MOST_RUNS", 4)
    for index in range(26):
        decay = 0.01 * index
        write_run(tmp_path / str(index), falling_to(3 + decay), [5.0] * 160, optimizer__weight_decay=decay)
    write_run(tmp_path / "lost", {0: 5.0, 160: 6.0}, [5.0] * 160, optimizer__weight_decay=0.0, seed=1)
    content = html.unescape(render_page(compare_runs([tmp_path]), {}, [], []))
    assert "show the first 24 of 26 contenders" in content
    assert "4 of the contenders' 25 single runs" in content
    assert "<summary>2 other settings</summary>" in content
    contenders = json.loads(Text(content).scripts[0])["contenders"]
    drawn = [run["name"] for contender in contenders for run in contender["runs"]]
    assert len(contenders) == 24
    assert len(drawn) == 4
    assert "lost" in drawn


@pytest.fixture(scope="module")
def opened(page: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page in a browser, after a visitor has tried its switches: its elements, and what the console says."""
    if CHROMIUM is None:
        pytest.skip("needs a Chromium to open the page with")
    folder = tmp_path_factory.mktemp("browser")
    visited = folder / "visited.html"
    visited.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{ACTIONS}</script></body>"))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=30000",
        "--dump-dom", visited.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return result.stdout, "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)


def test_a_browser_draws_the_page_without_an_error(opened: tuple[str, str]) -> None:
    elements, console = opened
    assert console == ""
    assert elements.count('class="main-svg"') >= 2
    title = re.search(r"<title>(.*?)</title>", elements)
    assert title is not None
    assert title[1].startswith("asgo wins")
    assert f"{np.mean(FINALS['asgo']):.4f} ± " in elements


def test_the_switches_change_what_is_drawn(opened: tuple[str, str]) -> None:
    found = re.search(r'<pre id="seen">(.*?)</pre>', opened[0])
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["first"]["title"] == "step"
    # Of both contenders: validation and training means; of asgo, the diverged run.
    assert seen["first"]["ends"] == [160] * 5
    assert seen["first"]["names"] == ["asgo", "adamw", "target"]
    assert (seen["tokens"]["title"], seen["tokens"]["ends"]) == ("tokens", [160 * 16 * 128] * 5)
    assert seen["seconds"]["title"].startswith("seconds of training")
    assert seen["seconds"]["ends"] == [80] * 5
    assert seen["half"]["range"][0] == pytest.approx(40)
    assert seen["runs"]["ends"] == [80] * 7
    assert seen["hidden"] == ["adamw"] * 3
