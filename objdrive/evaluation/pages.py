"""HTML pages that load nothing from anywhere, by the templates beside this module."""

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, **values: Any) -> str:
    """The page that a template makes of values; text in them is escaped.

    Args:
        template: its file's name without ``.html.j2``.
        values: what it shows. ``page.html.j2`` takes ``title`` and ``facts``, pairs of name and value.
    """
    return _environment().get_template(f"{template}.html.j2").render(values)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("objdrive.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters["data_url"] = _data_url
    return environment


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
