"""Reading a checkpoint's pickles as data: an allow-list for the index, torch's weights-only reader for the rest."""

from __future__ import annotations

import errno
import pickle
from enum import EnumMeta
from pathlib import Path
from types import FunctionType
from typing import Any

from primus_bridge.errors import ConfigError

_CHECKPOINT = "torch.distributed.checkpoint"
# what torch 2.7 to 2.13 and megatron.core write; each is a plain record, an enumeration, or a look-up by name
ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads ``.metadata``; a class outside ALLOWED, torch.Size and the dtypes is refused before anything is called."""

    def __init__(self, stream, where: str):
        super().__init__(stream)
        self.where = where
        self._attributes: dict[int, tuple[Any, dict[str, Any]]] = {}

    def find_class(self, module: str, name: str):
        if name in ALLOWED.get(module, ()) or (module == "torch" and self._plain_of_torch(name)):
            found = super().find_class(module, name)
            owners: list[Any] = [found] if isinstance(found, type) else []
            owners += found if isinstance(found, EnumMeta) else []  # its members are one for the whole process too
            for owner in owners:
                self._attributes.setdefault(id(owner), (owner, dict(vars(owner))))
            # a function of this pickle's own: attributes that it sets on it are lost
            return (lambda *words: found(*words)) if isinstance(found, FunctionType) else found
        raise ConfigError(
            f"damaged or hostile checkpoint: its index is a pickle that asks for {module}.{name}, which no checkpoint "
            "needs; nothing was run, do not use this folder",
            where=self.where,
        )

    @staticmethod
    def _plain_of_torch(name: str) -> bool:
        import torch

        return name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)

    def restore(self) -> None:
        """Undo what the pickle did to the classes themselves: a pickle may set attributes on anything that it names.

        Raises ConfigError when there was something to undo.
        """
        missing = object()
        changes = []
        for owner, before in self._attributes.values():
            now = dict(vars(owner))
            changes += [(owner, key, before) for key in now | before if now.get(key) is not before.get(key, missing)]
        for owner, key, before in changes:
            if not isinstance(owner, type):
                vars(owner).clear()
                vars(owner).update(before)
            elif key in before:
                type.__setattr__(owner, key, before[key])
            else:
                type.__delattr__(owner, key)
        if changes:
            owner, key, _ = changes[0]
            raise ConfigError(
                f"hostile checkpoint: its index is a pickle that changes {key} of {owner}; that was undone, do not use "
                "this folder",
                where=self.where,
            )


def read_index(stream, where: str):
    """The Metadata of the file ``where``, a ``.metadata``, whose content is ``stream``; all it names lies beside it.

    Raises ConfigError, naming file and class, for anything else.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    unpickler = _IndexUnpickler(stream, where)
    try:
        metadata = unpickler.load()
        if not isinstance(metadata, Metadata):
            raise ConfigError(f"damaged checkpoint: its index holds a {type(metadata).__name__}", where=where)
        names = {info.relative_path for info in (metadata.storage_data or {}).values()}
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise ConfigError(f"damaged checkpoint: its index cannot be read ({error})", where=where) from error
    finally:
        unpickler.restore()
    folder = Path(where).parent
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"damaged or hostile checkpoint: its index names a file outside its folder, {name}; do not use this "
                "folder",
                where=where,
            )
    return metadata


def load_plain(source, where: str):
    """``torch.load(weights_only=True)`` on the CPU. Raises ConfigError, naming file and class, for anything else."""
    import torch

    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what torch's reader says of a file that is cut off
            raise
        raise ConfigError("damaged checkpoint: its file is cut off", where=where) from None
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise ConfigError(
            f"damaged or hostile checkpoint: not a file of plain values and tensors ({refusal_of_torch(error)}); "
            "nothing was run",
            where=where,
        ) from None


def refusal_of_torch(error: BaseException) -> str:
    """Why torch.load refused, in a line.

    Its own message is a page of advice on how to run the code after all; the line on the class says why.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "global" in line.lower()), lines[0] if lines else repr(error))
    return reason.removeprefix("WeightsUnpickler error: ").split(" was not an allowed global")[0].partition(". ")[0]
