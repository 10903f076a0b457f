"""The figures as files: of the right kind, the same each time, with nothing hidden."""

import base64
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageSequence

from models.expression import expression_function
from models.functions import FUNCTIONS, Point
from pipelines.analysis.figure_style import (
    MOST_STYLES,
    figure_style,
    is_crowded,
    lay_out,
    legend_below,
    line_style,
    plotly_line,
)
from pipelines.analysis.loss_figure import LossCurve, draw_losses, smoothed
from pipelines.analysis.optimizer_settings import default_settings, parse_settings
from pipelines.analysis.trajectories import Trajectory, run_trajectories
from pipelines.analysis.trajectory_animation import animate_trajectories, frame_steps
from pipelines.analysis.trajectory_figure import Window, compose, draw_trajectories, leaves_at, place_inset, relief_in
from pipelines.analysis.trajectory_page import write_trajectories
from pipelines.analysis.viz_page import write_page
from pipelines.errors import UsageError

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-1.", ".svg": b"<?xml"}


def trajectories(name: str, steps: int = 60, optimizers: list[str] | None = None) -> list[Trajectory]:
    settings = [parse_settings(text) for text in optimizers] if optimizers else default_settings()
    return run_trajectories(FUNCTIONS[name], settings, steps=steps)


def curve(label: str, steps: int = 40) -> LossCurve:
    train = list(range(1, steps + 1))
    val = list(range(0, steps + 1, 10))
    return LossCurve(label, train, [5 / math.sqrt(s) for s in train], val, [5 / math.sqrt(s + 1) for s in val])


def png_size(content: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def images_in(svg: str) -> list[np.ndarray]:
    """The bytes of the scan lines of every image inside an SVG file."""
    contents = [base64.b64decode(image) for image in re.findall(r"data:image/png;base64,\s*([^\"]+)", svg)]
    data = [b"".join(re.findall(rb"IDAT(.*?)(?=.{8}I(?:DAT|END))", content, re.DOTALL)) for content in contents]
    return [np.frombuffer(zlib.decompress(part), dtype=np.uint8) for part in data]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same trajectories as a file of each kind."""
    folder = tmp_path_factory.mktemp("drawn") / "new folder"
    for suffix in MAGIC:
        draw_trajectories([trajectories("rosenbrock")], folder / f"figure{suffix}")
    assert len(list(folder.iterdir())) == len(MAGIC)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", MAGIC)
def test_a_trajectory_figure_is_a_file_of_its_kind(drawn: dict[str, bytes], suffix: str) -> None:
    assert drawn[suffix].startswith(MAGIC[suffix])
    if suffix == ".png":
        assert png_size(drawn[suffix]) == (800, 880)


@pytest.mark.parametrize("suffix", MAGIC)
def test_a_figure_is_the_same_each_time_whatever_the_users_settings(
    drawn: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # the date that a file with dates would have
    path = tmp_path / f"another name{suffix}"
    with matplotlib.rc_context({"font.size": 20.0, "figure.facecolor": "red", "svg.fonttype": "path"}):
        draw_trajectories([trajectories("rosenbrock")], path)
        assert matplotlib.rcParams["font.size"] == 20.0
    assert path.read_bytes() == drawn[suffix]


def test_figures_and_pages_are_written_through_links_that_stay(tmp_path: Path) -> None:
    for name, write in {
        "figure.png": lambda path: draw_losses([curve("a")], path),
        "movie.gif": lambda path: animate_trajectories([trajectories("beale", 2, ["adam"])], path),
        "page.html": lambda path: write_page([], path),
    }.items():
        (tmp_path / name).symlink_to(tmp_path / f"real-{name}")
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"real-{name}").stat().st_size > 100


def test_text_stays_text_in_vector_files(drawn: dict[str, bytes]) -> None:
    svg = drawn[".svg"].decode()
    for text in ("Rosenbrock", "(1 − x)² + 100 (y − x²)²", "Adam, lr 0.2", "AccAsro, lr 0.01", "optimum", ">x<", ">y<"):
        assert text in svg
    assert b"/FontFile2" in drawn[".pdf"]  # an embedded TrueType font


def test_contours_are_filled_in_the_panel_and_in_the_inset(drawn: dict[str, bytes]) -> None:
    images = images_in(drawn[".svg"].decode())
    assert len(images) == 2
    assert all(len(np.unique(image)) > 50 for image in images)


@pytest.mark.parametrize("suffix", MAGIC)
def test_a_loss_figure_is_a_file_of_its_kind_and_the_same_each_time(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"]
    for path in paths:
        draw_losses([curve("AccAsro"), curve("AdamW")], path)
    assert paths[0].read_bytes().startswith(MAGIC[suffix])
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_window_holds_everything_and_the_inset_hides_nothing(name: str) -> None:
    panel = trajectories(name, steps=100)
    window, corner = place_inset(panel, panel[0].function.optimum)
    marks = np.array([panel[0].function.start, *panel[0].function.optima])
    visited = np.concatenate([trajectory.points for trajectory in panel])
    assert window.count(marks) == len(marks)
    assert window.count(visited) == len(visited)
    cover = window.part(corner, corner + 0.37)
    assert cover.count(marks) == 0
    assert cover.count(visited) == 0
    assert cover.count(window.around(panel[0].function.optimum).corners()) == 0


def test_a_far_overshoot_does_not_shrink_the_rest_to_a_dot(tmp_path: Path) -> None:
    panel = trajectories("rosenbrock", steps=30, optimizers=["sgd-momentum:lr=1", "adam"])
    assert abs(panel[0].points).max() > 1e20
    window, _ = place_inset(panel, (1.0, 1.0))
    assert ((window.high - window.low) < 15).all()
    draw_trajectories([panel], tmp_path / "a.png")
    assert png_size((tmp_path / "a.png").read_bytes())[0] == 800


def test_a_start_at_the_optimum_can_be_drawn(tmp_path: Path) -> None:
    still = run_trajectories(FUNCTIONS["booth"], default_settings(), (1.0, 3.0), 3)
    draw_trajectories([still], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def own_function(
    expression: str, start: Point | None = None, optimizers: Sequence[str] = ("adam",)
) -> list[Trajectory]:
    settings = [parse_settings(text) for text in optimizers]
    return run_trajectories(expression_function(expression), settings, start, steps=40)


def test_where_the_optimum_is_unknown_the_lowest_point_found_is_marked(tmp_path: Path) -> None:
    own = own_function("x**2 - 3*y + y**2", optimizers=["adam:lr=0.01", "sgd-momentum:lr=0.1"])
    window, _ = place_inset(own, own[1].lowest_point)
    assert window.count(np.array([own[1].lowest_point])) == 1
    for panels, legend in (([own], [False, True]), ([trajectories("booth"), own], [True, True])):
        draw_trajectories(panels, tmp_path / "a.svg")
        svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert [f">{text}<" in svg for text in ("optimum", "lowest point found")] == legend


@pytest.mark.parametrize(
    "expression",
    ["0*x", "sqrt(-abs(x))", "-exp(x**2)", "log(x)*log(y)", "x**100", "-" + "+".join(["x*sin(y)"] * 30), "1e307*x*y"],
    ids=lambda text: text[:20],
)
@pytest.mark.filterwarnings("error")
def test_odd_expressions_can_be_drawn(tmp_path: Path, expression: str) -> None:
    start = (0.0, 1.0) if "sqrt" in expression else None
    draw_trajectories([own_function(expression, start, ("adam", "sgd-momentum:lr=100"))], tmp_path / "a.png")
    assert png_size((tmp_path / "a.png").read_bytes())[0] == 800


@pytest.fixture(scope="module")
def animation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two panels of different lengths that move."""
    path = tmp_path_factory.mktemp("animated") / "new folder" / "a.gif"
    own = run_trajectories(expression_function("x**2 + y**2"), default_settings(), steps=200)
    animate_trajectories([trajectories("booth"), own], path)
    return path


def test_an_animation_grows_from_the_start_to_the_last_point_and_repeats(animation: Path) -> None:
    with Image.open(animation) as gif:
        assert gif.info["loop"] == 0
        frames, times = [], []
        for frame in ImageSequence.Iterator(gif):
            frames.append(np.asarray(frame.convert("RGB")).astype(int))
            times.append(frame.info["duration"])
    assert 20 < len(frames) <= 60, "frames that are alike are one"
    assert times[-1] == 2500
    blue = [int((abs(frame - (0x00, 0x77, 0xBB)).max(axis=2) < 40).sum()) for frame in frames]
    red = [int((abs(frame - (0xCC, 0x33, 0x11)).max(axis=2) < 40).sum()) for frame in frames]
    assert red[0] < red[len(red) // 2] < red[-1]
    assert blue[0] < blue[-1]
    for mark in ((0xFF, 0x9E, 0x1B), (0x7B, 0x1F, 0xA2)):  # the start and the goal, from the first frame on
        assert all((abs(frame - mark).max(axis=2) < 25).sum() > 30 for frame in frames)
    assert animation.stat().st_size < 300_000


def test_an_animation_shows_the_first_and_the_last_step_and_the_early_ones_longer() -> None:
    for length in (1, 20, 20_000):
        steps = frame_steps(length)
        assert (steps[0], steps[-1], len(steps)) == (0, length, 60)
        assert steps == sorted(steps)
    assert frame_steps(20_000)[30] < 200


def test_the_view_and_the_noise_of_a_function_are_shown(tmp_path: Path) -> None:
    panel = trajectories("mccormick", steps=2)
    assert panel[0].function.view is not None
    window, _ = place_inset(panel, (0.5 - math.pi / 3, -0.5 - math.pi / 3))
    assert window.count(np.array(panel[0].function.view)) == 2
    draw_trajectories([trajectories("noisy_rosenbrock", steps=2)], tmp_path / "a.svg")
    assert ">gradient noise 10<" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_many_settings_all_get_a_legend_entry(tmp_path: Path) -> None:
    optimizers = [f"adam:lr=0.{index}" for index in range(1, 13)]
    draw_trajectories([trajectories("abs_sum", 5, optimizers)], tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(f"Adam, lr 0.{index}<" in svg for index in (1, 5, 11, 12))


def test_another_type_of_file_is_refused_and_nothing_written(tmp_path: Path) -> None:
    for name in ("a.jpg", "a"):
        with pytest.raises(UsageError, match=r"must end in \.png, \.pdf, \.svg"):
            draw_losses([curve("AccAsro")], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_legend_gives_the_last_validation_loss(tmp_path: Path) -> None:
    draw_losses([curve("AccAsro"), LossCurve("no validation", [1], [2.0], [], [])], tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert f"AccAsro ({5 / math.sqrt(41):.4f})" in svg
    assert ">no validation<" in svg


@pytest.mark.parametrize(
    "odd",
    [
        LossCurve("empty", [], [], [], []),
        LossCurve("one step", [1], [2.0], [0], [3.0]),
        LossCurve("not finite", [1, 2, 3], [2.0, math.nan, math.inf], [0, 3], [3.0, math.nan]),
        LossCurve("constant", [1, 2, 3], [2.0, 2.0, 2.0], [0, 3], [2.0, 2.0]),
    ],
    ids=lambda odd: odd.label,
)
def test_odd_curves_can_be_drawn(tmp_path: Path, odd: LossCurve) -> None:
    draw_losses([odd], tmp_path / "a.png")
    assert png_size((tmp_path / "a.png").read_bytes()) == (1400, 640)


def test_smoothing_removes_noise_and_keeps_level_and_slope() -> None:
    steps = list(range(1, 1001))
    noise = np.random.default_rng(0).normal(0, 0.1, 1000)
    line = LossCurve("", steps, [3 - step / 1000 for step in steps], [], [])
    noisy = LossCurve("", steps, [3 - step / 1000 + float(e) for step, e in zip(steps, noise, strict=True)], [], [])
    assert smoothed(line)[1][:980] == pytest.approx(line.train_losses[:980])
    assert np.std(smoothed(noisy)[1][50:] - smoothed(line)[1][50:]) < 0.03


def test_smoothing_leaves_out_losses_that_are_not_finite() -> None:
    steps, losses = smoothed(LossCurve("", [1, 2, 3, 4], [2.0, math.nan, 2.0, 2.0], [], []))
    assert steps.tolist() == [1, 3, 4]
    assert losses.tolist() == [2, 2, 2]


LABELS = [
    ["asgo"],
    ["adamw", *(f"adam lr=0.001 schedule.kind={kind} final_lr_fraction=0.01" for kind in ("constant", "cosine"))] * 3,
    [f"muon lr={index}e-4 weight_decay=0.1" for index in range(24)],
    ["a" * 300, "$x^2 \\frac{$ " * 10],
]


@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: str(len(labels)))
@pytest.mark.parametrize("width", [4.0, 7.0])
def test_no_legend_is_cut_or_takes_the_axes_their_room(labels: list[str], width: float) -> None:
    with figure_style():
        figure = Figure(figsize=(width, 3.4), layout="constrained")
        axes = figure.subplots()
        handles = [Line2D([], [], label=label, **line_style(index)) for index, label in enumerate(labels)]
        legend_below(figure, handles)
        lay_out(figure)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert len(legend.get_texts()) == len(labels)
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= axes.get_window_extent().y0
        assert axes.get_window_extent().height > 1.8 * figure.dpi
        for text in legend.get_texts():  # as it is measured now, not as it was planned
            assert box.x0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= box.x1


def test_crowded_tick_labels_get_fewer() -> None:
    with figure_style():
        figure = Figure(figsize=(2.0, 2.0), layout="constrained")
        numbers, names, scale = figure.subplots(3)
        numbers.set(xlim=(123_456, 123_457))
        numbers.locator_params(axis="x", nbins=12)
        names.set_xticks(range(12), [f"{index}.123456" for index in range(12)])
        scale.set(xscale="log", xlim=(1e-3, 3e-3))
        lay_out(figure)
        assert not any(is_crowded(axes.xaxis) for axes in (numbers, names, scale))
        assert sum(bool(label.get_text()) for label in names.get_xticklabels()) >= 2


LINEAR = {
    "all": np.eye(3),
    # Machado, Oliveira and Fernandes 2009, at full severity.
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
    "grey": np.array([[0.2126, 0.7152, 0.0722]] * 3),
}


def seen(colour: str, vision: str) -> np.ndarray:
    """CIELAB of a colour, as it is seen or printed."""
    srgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(LINEAR[vision] @ linear, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", LINEAR)
def test_lines_are_told_apart_by_dashes_where_colours_do_not(vision: str) -> None:
    count = 8 if vision == "grey" else MOST_STYLES
    styles = [line_style(index) for index in range(count)]
    for index, first in enumerate(styles):
        for second in styles[:index]:
            distance = np.linalg.norm(seen(first["color"], vision) - seen(second["color"], vision))
            # 10 is told apart at a glance; 2.3 is the least that can be seen side by side.
            assert distance >= 10 or first["linestyle"] != second["linestyle"]
    assert len({str(style["linestyle"]) for style in styles[:8]}) == 8


def test_a_page_has_the_dashes_of_the_figure() -> None:
    assert plotly_line(0, 2.0) == {"color": line_style(0)["color"], "dash": "solid", "width": 2.0}
    assert plotly_line(1, 2.0)["dash"] == "12px,4px"


def test_where_a_function_is_undefined_nothing_is_drawn() -> None:
    function = expression_function("sqrt(x) + y**2")
    window = Window(np.array([-1.0, -1.0]), np.array([1.0, 1.0]))
    relief = relief_in(function, window, (0.5, 0.0))
    assert relief is not None
    x, _, heights = relief
    assert np.isnan(heights[:, x < 0]).all()
    assert np.isfinite(heights[:, x >= 0]).all()


@pytest.mark.parametrize("suffix", [".png", ".gif", ".html"])
@pytest.mark.filterwarnings("error")
def test_a_function_that_is_undefined_in_a_part_is_drawn(tmp_path: Path, suffix: str) -> None:
    write_trajectories([own_function("log(x) + y**2", (1.0, 1.0), ("adam:lr=0.5",))], tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").stat().st_size > 1000


def test_a_divergence_is_marked_where_it_leaves_the_window() -> None:
    window = Window(np.array([0.0, 0.0]), np.array([4.0, 4.0]))
    away = np.array([[1.0, 1.0], [2.0, 2.0], [6.0, 2.0], [1e200, -1e200]])
    assert leaves_at(away, window).tolist() == [4.0, 2.0]
    assert leaves_at(away[:2], window).tolist() == [2.0, 2.0]
    panel = trajectories("rosenbrock", steps=30, optimizers=["sgd-momentum:lr=1", "adam"])
    with figure_style():
        figure, planes = compose([panel])
    lost, steady = planes[0].lines
    assert lost.diverged is not None
    assert steady.diverged is None
    shown, _ = place_inset(panel, (1.0, 1.0))
    assert shown.count(np.array([[lost.diverged.get_xdata()[0], lost.diverged.get_ydata()[0]]])) == 1
    assert "diverged" in [text.get_text() for text in figure.legends[0].get_texts()]
