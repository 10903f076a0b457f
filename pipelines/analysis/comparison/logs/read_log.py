"""Find logs of other programs, and read them: the content decides which kind a log is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.analysis.comparison.logs.column_names import Names, listed
from pipelines.analysis.comparison.logs.csv_files import header, is_csv, is_table_of_runs, read_csv
from pipelines.analysis.comparison.logs.hugging_face import STATE, newest_state, read_hugging_face
from pipelines.analysis.comparison.logs.log import Log
from pipelines.analysis.comparison.logs.run_names import SUFFIXES
from pipelines.analysis.comparison.logs.tensorboard_events import EVENTS, read_tensorboard
from pipelines.analysis.comparison.logs.text_logs import PROGRAMS, read_text
from pipelines.analysis.page_template import is_comparison
from pipelines.errors import AsgoError
from pipelines.storage import walk_once

KINDS = f"CSV, event files of TensorBoard, {STATE} of Hugging Face, the logs of {', '.join(PROGRAMS)}"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # what PowerShell writes for `>`


def logs_below(folder: Path) -> list[Path]:
    """Return the logs in a folder and its subfolders, sorted: files, folders of event files, and folders of a Trainer.

    Any CSV, text and log file counts. Leaves out hidden folders, W&B's own, which repeat what is logged elsewhere, and
    reports of comparisons.
    """
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, files in walk_once(folder):
        if is_comparison(here / "index.html"):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "wandb")))
        if newest_state(here) is not None:
            folders.clear()  # its event files are in a subfolder
            yield here
            continue
        if any(name.startswith(EVENTS) for name in files):
            yield here
        yield from (here / name for name in files if name.endswith(SUFFIXES[:-1]) and not name.startswith("."))


def read_log(path: Path, given: Names) -> list[Log]:
    """Return the runs of a log. `given` are names of columns or tags.

    Raises `AsgoError` if it is not a log that can be read, and `UsageError` if there is no column of a given name.
    """
    if path.is_dir():
        state = newest_state(path)
        return read_tensorboard(path, given) if state is None else read_hugging_face(state, given)
    if path.name.startswith(EVENTS):
        return read_tensorboard(path, given)
    content = path.read_bytes()
    if content.startswith(_UTF16):
        content = content.decode("utf-16", "replace").encode()
    if content.lstrip().startswith(b"{"):
        return read_hugging_face(path, given)
    if not content.strip():
        raise AsgoError(f"{path}: empty")
    if is_table_of_runs(content):
        raise AsgoError(f"{path}: the table of a report, not a log; give the runs themselves, or judge it with a claim")
    logs = ([] if is_csv(content) else read_text(content)) or read_csv(path, content, given)
    if not logs:
        names = header(content)[0]
        its_names = f"; its first line has {listed(names)}" if 1 < len(names) < 1000 and b"\0" not in content else ""
        raise AsgoError(
            f"{path}: neither a CSV with a column of steps in its first line, nor a log of {', '.join(PROGRAMS)}; "
            f"name the columns of a CSV: --columns step=NAME,val.loss=NAME{its_names}"
        )
    return logs
