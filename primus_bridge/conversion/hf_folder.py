"""Hugging Face folders: config, tokenizer files and safetensors, read by slices and written as a stream."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional

import torch

from primus_bridge.errors import ConfigError
from primus_bridge.files import check_writable, looks_like_path

INDEX = "model.safetensors.index.json"
# what travels along unchanged, beside config.json
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA = {"format": "pt", "writer": "primus_bridge"}
"""In the header of every safetensors file written here; transformers asks for the first."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_NAMES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def float_dtype(name: str) -> torch.dtype:
    """bf16, fp32, fp16 (or torch's names) -> dtype. Raises ConfigError for another word."""
    if name not in FLOAT_NAMES:
        raise ConfigError(f"unknown dtype {name!r}; give one of {', '.join(FLOAT_NAMES)}")
    return FLOAT_NAMES[name]


def is_folder(name: str) -> bool:
    """Whether a model name means a folder: it exists, or is spelled as only a path can be."""
    return Path(name).is_dir() or looks_like_path(name)


def resolve(name: str, weights: bool) -> Path:
    """A local folder as it is; a hub id fetched into the Hugging Face cache (resumable, with progress).

    Only what is needed: config and tokenizer, and the safetensors when ``weights``. The hub client locks its cache,
    so ranks of one node may call it at once. Raises ConfigError when there is no such folder or model.
    """
    if is_folder(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError("no such model folder", where=name)
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", GENERATION_CONFIG, *TOKENIZER_PATTERNS] + (["*.safetensors", INDEX] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
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


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from a safetensors header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file, checked against the file's size.

    Raises ConfigError that names the file (and tensor) when it is truncated or not a safetensors file.
    Format: 8 bytes little-endian header length, JSON header, data; https://huggingface.co/docs/safetensors
    """
    size = path.stat().st_size
    header, data = _header(path)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (_, last) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
            end = data + int(last)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"damaged header: tensor {name} is described as {entry!r}", where=str(path)) from None
        if dtype not in DTYPES:
            raise ConfigError(f"tensor {name} has dtype {dtype}, which is not supported", where=str(path))
        if end > size:
            raise ConfigError(
                f"truncated: tensor {name} ends at byte {end}, the file at {size}; fetch the file again",
                where=str(path),
            )
        tensors[name] = TensorInfo(path, DTYPES[dtype], shape)
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(a safetensors file's header, where its data starts)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size - 8:
            raise ConfigError(f"truncated or not a safetensors file ({size} bytes)", where=str(path))
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ConfigError("not a safetensors file: its header is not JSON", where=str(path)) from None
    if not isinstance(header, dict):
        raise ConfigError("not a safetensors file: its header is no JSON object", where=str(path))
    return header, 8 + length


def is_own_export(folder: Path) -> bool:
    """Whether this package wrote the weights or the adapter in ``folder``: its safetensors say so."""
    try:
        headers = [_header(path)[0] for path in folder.glob("*.safetensors")]
    except (ConfigError, OSError):
        return False
    return bool(headers) and all((h.get("__metadata__") or {}).get("writer") == METADATA["writer"] for h in headers)


class HFWeights:
    """The tensors of a model folder, read by slices from memory-mapped safetensors (a TensorReader).

    Opening checks every file; raises ConfigError for a folder without safetensors, an index that names a missing file
    or one outside the folder, a truncated file, a tensor that two files hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        for path in self._files(folder):
            for name, info in read_header(path).items():
                if name in self.tensors:
                    raise ConfigError(f"tensor {name} is also in {self.tensors[name].file.name}", where=str(path))
                self.tensors[name] = info

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        index = folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ConfigError("weight_map is not an object of tensor names and file names", where=str(index))
            names = sorted(set(weight_map.values()))
            for name in names:
                if Path(name).name != name:
                    raise ConfigError(f"names a file outside the folder: {name!r}", where=str(index))
            files = [folder / name for name in names]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise ConfigError(f"names files that are not there: {', '.join(missing)}", where=str(index))
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle, which is not read: save the model as safetensors" if pickled else ""
            raise ConfigError(f"the model folder has no weights (*.safetensors){hint}", where=str(folder))
        return files

    def read(self, name: str, rows: Optional[slice] = None, columns: Optional[slice] = None) -> torch.Tensor:
        """The tensor, or its given rows or columns: only their bytes are read."""
        from safetensors import safe_open

        path = self.tensors[name].file
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        view = self._open[path].get_slice(name)
        if columns is not None:
            return view[:, columns].contiguous()
        return view[rows] if rows is not None else view[:] if self.tensors[name].shape else view[...]

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating-point dtype among the tensors: the one that loses nothing."""
        dtypes = {info.dtype for info in self.tensors.values() if info.dtype.is_floating_point}
        result = torch.bfloat16 if torch.bfloat16 in dtypes else next(iter(dtypes), torch.float32)
        for dtype in dtypes:
            result = torch.promote_types(result, dtype)
        return result


def write_safetensors(path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors) -> None:
    """Write one file as a stream: ``tensors`` yields (name, tensor) in the order of ``entries``, one at a time.

    Memory stays at one tensor however large the file is.
    """
    header: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for name, (dtype, shape) in entries.items():
        size = dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts aligned, as the reference writer does
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for (name, (dtype, shape)), (given, tensor) in zip(entries.items(), tensors, strict=True):
            assert given == name and tuple(tensor.shape) == shape and tensor.dtype == dtype, (name, given, tensor.shape)
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


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
    import shutil

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
