"""Self-contained HTML pages: text is escaped, and plotly is embedded."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
