"""Names that other rooms define, and that a configuration may only choose from: row formats and prompt templates."""

from __future__ import annotations

from typing import Any

from primus_bridge.config.schema import shown
from primus_bridge.errors import did_you_mean

FORMAT, TEMPLATE = "dataset.dataset_format", "dataset.prompt_template"


def checked(argument: str, value: Any) -> None:
    """Raises ValueError, with the names there are, when ``value`` is none that the argument may have."""
    if argument == FORMAT:
        from primus_bridge.data.formats import ALIASES, FORMATS

        names, also, more = FORMATS, tuple(ALIASES), ""
    elif argument == TEMPLATE:
        from primus_bridge.data.templates import JINJA, TEMPLATES, YAML

        if isinstance(value, str) and value.endswith(JINJA + YAML):
            return
        names, also, more = TEMPLATES, (), ", or the path of a .jinja or .yaml file"
    else:
        return
    if value not in names + also:
        hint = did_you_mean(value, names + also)
        raise ValueError(f"must be one of {', '.join(names)}{more}; got {shown(value)}{hint}")
