"""Self-contained HTML pages: text is escaped, and plotly is embedded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMPARISON = '<meta name="generator" content="asgo compare">'
"""Tag of the page of a comparison."""


def is_comparison(page: Path) -> bool:
    """Return whether the file is the page of a comparison, which is in the folder of its report."""
    try:
        with page.open(encoding="utf-8") as file:
            return COMPARISON in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


def render(folder: Path, **values: object) -> str:
    """Render `folder / page.html.jinja` with the values and `plotly`, the library's source.

    Numbers that the template passes to `|tojson` must be finite.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    policies: dict[str, Any] = environment.policies
    policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html.jinja").render(plotly=get_plotlyjs(), **values)
