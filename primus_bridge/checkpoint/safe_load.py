"""Reading a checkpoint's pickles as data: an allow-list for the index, torch's weights-only reader for the rest."""

from __future__ import annotations

import pickle

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

    def find_class(self, module: str, name: str):
        if name in ALLOWED.get(module, ()) or (module == "torch" and self._plain_of_torch(name)):
            return super().find_class(module, name)
        raise ConfigError(
            f"damaged or hostile checkpoint: its index is a pickle that asks for {module}.{name}, which no checkpoint "
            "needs; nothing was run, do not use this folder",
            where=self.where,
        )

    @staticmethod
    def _plain_of_torch(name: str) -> bool:
        import torch

        return name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)


def read_index(stream, where: str):
    """The Metadata of a ``.metadata`` stream. Raises ConfigError, naming file and class, for anything else."""
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        metadata = _IndexUnpickler(stream, where).load()
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise ConfigError(f"damaged checkpoint: its index cannot be read ({error})", where=where) from error
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"damaged checkpoint: its index holds a {type(metadata).__name__}", where=where)
    return metadata


def load_plain(source, where: str):
    """``torch.load(weights_only=True)`` on the CPU. Raises ConfigError, naming file and class, for anything else."""
    import torch

    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, KeyError) as error:
        # torch's message is a page of advice on how to run the code after all; the line on the class says why
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "global" in line.lower()), lines[0] if lines else repr(error))
        reason = reason.removeprefix("WeightsUnpickler error: ").split(" was not an allowed global")[0]
        raise ConfigError(
            f"damaged or hostile checkpoint: not a file of plain values and tensors ({reason}); nothing was run",
            where=where,
        ) from None
