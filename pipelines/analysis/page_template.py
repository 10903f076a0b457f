"""Pages of HTML with everything in them: text is escaped, and plotly is part of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(folder: Path, **values: object) -> str:
    """The page that `folder / page.html.jinja` makes of the values and `plotly`, the library's source.

    What `|tojson` is given must be finite.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    policies: dict[str, Any] = environment.policies
    policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html.jinja").render(plotly=get_plotlyjs(), **values)
