"""Hugging Face folders: found or fetched, their config and what travels along, and where an export may go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Mapping, Optional

from primus_bridge.errors import ConfigError
from primus_bridge.files import check_writable, existing_parent, looks_like_path

if TYPE_CHECKING:
    import torch

# what travels along unchanged, beside config.json
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "*.spm",
    "sentencepiece.*",
    "chat_template*",
)
WEIGHT_PATTERNS = ["*.safetensors", "model.safetensors.index.json"]
PICKLED_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# the same weights once more, under other names
IGNORED_PATTERNS = ["*/*", "consolidated*"]
QUANTISED_CONFIG = ("quantization_config", "compression_config")
FLOAT_NAMES = {
    "float64": "float64",
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}


def float_dtype(name: str) -> torch.dtype:
    """bf16, fp32, fp16 (or torch's names) -> dtype. Raises ConfigError for another word."""
    if name not in FLOAT_NAMES:
        raise ConfigError(f"unknown dtype {name!r}; give one of {', '.join(FLOAT_NAMES)}")
    import torch

    return getattr(torch, FLOAT_NAMES[name])


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype, as float_dtype reads it."""
    return str(dtype).removeprefix("torch.")


def is_folder(name: str) -> bool:
    """Whether a model name means a folder: it exists, or is spelled as only a path can be."""
    return Path(name).is_dir() or looks_like_path(name)


def resolve(name: str, weights: bool) -> Path:
    """A local folder as it is; a hub id fetched into the Hugging Face cache (resumable, with progress).

    Only what is needed: config and tokenizer, and the weights when ``weights``: safetensors, or pickled ones where
    there are no others. The hub client locks its cache, so ranks of one node may call it at once. Raises ConfigError
    when there is no such folder or model.
    """
    if is_folder(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError("no such model folder", where=name)
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", GENERATION_CONFIG, *TOKENIZER_PATTERNS] + (WEIGHT_PATTERNS if weights else [])
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=IGNORED_PATTERNS))
        if weights and not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=PICKLED_PATTERNS, ignore_patterns=IGNORED_PATTERNS)
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"is neither a folder here nor a model the hub gives ({str(error).splitlines()[0]}); "
            "check the name, HF_TOKEN and the network, or give a folder",
            where=name,
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError with file and line when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path)) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"malformed JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: {error.reason}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ConfigError("expected a JSON object", where=str(path))
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ConfigError when it has none."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                "holds a PEFT adapter, not a model: give the model under it, or merge the two first (peft: "
                "merge_and_unload; of our own run: python -m primus.cli.convert --load CKPT --convert_to_hf --merge)",
                where=str(folder),
            )
        raise ConfigError("not a Hugging Face model folder: it has no config.json", where=str(folder))
    return read_json(path)


def check_unquantised(folder: Path) -> None:
    """Raises ConfigError when the config.json of a model folder, if it has one, says that its weights are quantised."""
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path)
        for key in QUANTISED_CONFIG:
            if config.get(key):
                raise quantised(key, path)


def quantised(reason: str, where: Path) -> ConfigError:
    """What is said of weights that are quantised; reason: how one sees it."""
    return ConfigError(f"the checkpoint is quantised ({reason}); give the unquantised model", where=str(where))


def is_own_export(folder: Path) -> bool:
    """Whether this package wrote the weights or the adapter in ``folder``: its safetensors say so."""
    from primus_bridge.conversion.safetensors_file import METADATA, read_raw_header

    try:
        headers = [read_raw_header(path)[0] for path in folder.glob("*.safetensors")]
    except (ConfigError, OSError):
        return False
    return bool(headers) and all((h.get("__metadata__") or {}).get("writer") == METADATA["writer"] for h in headers)


def parse_size(text: str) -> int:
    """ "5GB", "500MB", "1GiB" -> bytes. Raises ConfigError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    upper = str(text).strip().upper()
    for unit in sorted(units, key=len, reverse=True):
        if upper.endswith(unit):
            number = upper[: -len(unit)].strip()
            if number.replace(".", "", 1).isdigit() and float(number) > 0:
                return int(float(number) * units[unit])
    if upper.isdigit() and int(upper) > 0:
        return int(upper)
    raise ConfigError(f"max_shard_size {text!r} is not a size; give one such as 5GB or 500MB")


def asset_files(model: Path, tokenizer: Optional[Path] = None) -> list[Path]:
    """What travels along unchanged: a model's generation config, and the tokenizer and chat template beside it.

    tokenizer: the folder of another tokenizer, when the run has one.
    """
    found = {path for pattern in TOKENIZER_PATTERNS for path in (tokenizer or model).glob(pattern) if path.is_file()}
    generation = model / GENERATION_CONFIG
    return sorted(found) + ([generation] if generation.is_file() else [])


def copy_assets(files: Iterable[Path], target: Path) -> None:
    for path in files:
        shutil.copyfile(path, target / path.name)


def check_export_folder(folder: Path, apart: Optional[Mapping[str, Optional[str | Path]]] = None) -> None:
    """Raises ConfigError when an export, which replaces ``folder`` as a whole, cannot be or would destroy something.

    apart: what must not be replaced, name -> place. A folder that is there must be empty or an earlier export of ours.
    """
    check_writable(folder, "the export folder")
    check_writable(folder.parent, "the parent of the export folder")
    if folder.resolve().is_mount():
        raise ConfigError("is a mount point, which cannot be replaced; give a folder inside it", where=str(folder))
    for name, place in (apart or {}).items():
        if place is not None and Path(place).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"the export would replace {name} {place}; give a folder of its own", where=str(folder))
    if folder.is_dir() and any(folder.iterdir()) and not is_own_export(folder):
        raise ConfigError("is not empty and holds no export of ours; give another folder", where=str(folder))


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ConfigError when the disk of ``folder`` (which need not exist yet) has less free than ``what`` needs."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed_bytes:
        raise ConfigError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; give another folder",
            where=str(folder),
        )
