"""Animated GIF of trajectories that grow over the contours of test functions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from PIL import Image

from pipelines.analysis.figure_style import figure_style
from pipelines.analysis.trajectories import Trajectory
from pipelines.analysis.trajectory_figure import Plane, compose
from pipelines.storage import write_output

_FRAMES = 60
_FRAME_TIME, _LAST_FRAME_TIME = 80, 2500  # milliseconds
_DPI = 110


def animate_trajectories(panels: Sequence[Sequence[Trajectory]], path: Path) -> None:
    """Write the figure of `draw_trajectories` as a looping GIF of 60 frames in which the lines grow.

    Frames are spaced on a log scale over the steps: the first steps, where most happens, have one frame each.
    """
    with figure_style():
        figure, planes = compose(panels)
        figure.set_dpi(_DPI)
        frames = _render(figure, planes, [trajectories[0].steps for trajectories in panels])
    write_output(path, _as_gif(frames))


def frame_steps(steps: int) -> list[int]:
    """Return the step shown in each frame, from 0 to `steps`; frames may repeat a step."""
    return [round(step) - 1 for step in np.geomspace(1, steps + 1, _FRAMES)]


def _render(figure: Figure, planes: Sequence[Plane], lengths: Sequence[int]) -> list[Image.Image]:
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    counters = [_step_counter(plane) for plane in planes if not plane.is_inset]
    for artist in (*counters, *(artist for plane in planes for artist in _moving(plane))):
        artist.set_animated(True)
    # Contours take most of the time: draw them once, and the moving parts on a copy for each frame.
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    planes_alone = [canvas.copy_from_bbox(plane.axes.bbox.padded(1)) for plane in planes]
    frames = []
    for shown in zip(*map(frame_steps, lengths), strict=True):
        canvas.restore_region(background)
        for index, (plane, plane_alone) in enumerate(zip(planes, planes_alone, strict=True)):
            if plane.is_inset:
                canvas.restore_region(plane_alone)  # erase the panel's lines under the inset
            _draw_until(plane, shown[index // 2])
        for counter, step in zip(counters, shown, strict=True):
            counter.set_text(f"step {step:,}")
            figure.draw_artist(counter)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return frames


def _step_counter(plane: Plane) -> Annotation:
    """Add a text right-aligned on the line of the axis label."""
    return plane.axes.annotate("", (1, 0), (0, -24), "axes fraction", "offset points", ha="right", fontsize=7)


def _moving(plane: Plane) -> list[Line2D]:
    """Return all artists above the contours, from bottom to top."""
    artists = [artist for line in plane.lines for artist in (*line.strokes, line.last)]
    artists += [line.diverged for line in plane.lines if line.diverged is not None]
    return sorted(artists + plane.marks, key=Line2D.get_zorder)


def _draw_until(plane: Plane, step: int) -> None:
    for line in plane.lines:
        points = line.points[:, : step + 1]
        for stroke in line.strokes:
            stroke.set_data(*points)
        line.last.set_data(*points[:, -1:])
        if line.diverged is not None:
            line.diverged.set_visible(step >= line.points.shape[1] - 1)
    for artist in _moving(plane):
        plane.axes.draw_artist(artist)


def _as_gif(frames: Sequence[Image.Image]) -> bytes:
    palette = _palette(frames[-1])
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    times = [_FRAME_TIME] * (len(frames) - 1) + [_LAST_FRAME_TIME]
    indexed[0].save(content, "GIF", save_all=True, append_images=indexed[1:], duration=times, loop=0)
    return content.getvalue()


def _palette(frame: Image.Image) -> Image.Image:
    """Return one palette for all frames, so that colours do not flicker; from the last frame, which shows every line.

    Half of the palette are the most frequent colours, for contours; half are far apart, for small marks.
    """
    methods = (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE)
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for method in methods for part in frame.quantize(128, method).getpalette() or []])
    return palette
