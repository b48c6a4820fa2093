"""Whether the model that an adapter names as its base is the one at hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

from primus_bridge.conversion.hf_folder import is_folder
from primus_bridge.conversion.model_folder import HFModel

_CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/")
_QUANTISED = re.compile(r"(-unsloth)?-bnb-[48]bit$")


def _last_word(name: str) -> str:
    """ "meta-llama/Llama-3.1-8B", "/data/Llama-3.1-8B/", the hub's cache of it, "unsloth/Llama-3.1-8B-bnb-4bit" ->
    "llama-3.1-8b". An adapter over quantised weights (QLoRA) is one over the weights themselves."""
    cached = _CACHED.search(name)
    word = cached["name"] if cached else name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return _QUANTISED.sub("", word.lower())


def same_base(base: Optional[str], model: HFModel) -> bool:
    """base: as the adapter names it; None: it does not say, and anything is.

    The same hub id or folder; else names whose last part is the same, wherever they lie (a hub id and a download of
    it); else the name that the model's own config.json gives (``_name_or_path``).
    """
    if base is None or base == model.name:
        return True
    if is_folder(base) and Path(base).expanduser().resolve() == model.folder.resolve():
        return True
    names = [model.name if not is_folder(model.name) else str(model.folder.resolve())]
    given = model.architecture.hf_config.get("_name_or_path")
    names += [given] if isinstance(given, str) and given else []
    return _last_word(base) in [_last_word(name) for name in names]
