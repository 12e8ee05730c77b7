"""Templates to text. HTML escapes every value by itself; Markdown values pass the `md` filter."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2

HERE = Path(__file__).parent


def render(template: str, **values: object) -> str:
    """The text of one of this room's templates; a name it lacks is an error, not an empty place."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=lambda name: name is not None and not name.endswith(".md.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["md"] = markdown
    pages.filters["fence"] = fence
    return pages.get_template(template).render(**values)


def markdown(text: str) -> str:
    """One line of Markdown that shows `text` as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


def fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"
