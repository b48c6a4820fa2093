"""The keys of Primus's native (Megatron-LM) presets and examples that no argument stands for: native_keys.yaml."""

from __future__ import annotations

import functools

from primus_bridge.config.merge import Compared, Entry, Noted, Refused
from primus_bridge.config.yaml_file import shipped_table


@functools.cache
def native_keys() -> dict[str, Entry]:
    """Key -> why it changes nothing here, or cannot be honoured; at Primus's own default there is nothing to say.

    A group's ``neutral`` has more values of that kind. In a ``compared`` group a key has its type.
    """
    entries: dict[str, Entry] = {}
    for group in shipped_table("native_keys.yaml"):
        for key, default in group["keys"].items():
            neutral = ((None, False) if default is None else (default, None)) + tuple(group.get("neutral", ()))
            if "compared" in group:
                entries[key] = Compared(group["compared"], {"int": int, "float": float}[default])
            elif "refused" in group:
                entries[key] = Refused(group["refused"], neutral)
            else:
                entries[key] = Noted(group["noted"], neutral)
    return entries
