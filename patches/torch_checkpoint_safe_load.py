"""torch.distributed.checkpoint without free unpickling: a checkpoint from somebody else is data, never code.

A torch_dist checkpoint's index, ``.metadata``, is a pickle that torch reads with ``pickle.load``, and its byte entries
go through ``torch.load(weights_only=False)``. Here the first may name only the classes that such an index is made of,
and the second only what torch's own weights-only reader allows. common.pt is read by megatron.core with torch's
default, which is weights-only unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: here it is said aloud.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

from primus_bridge.errors import ConfigError
from primus_bridge.patching import Patch

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


def _apply() -> None:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from megatron.core.msc_utils import MultiStorageClientFeature
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint._traverse import set_element
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import StorageMeta

    if getattr(FileSystemReader.read_metadata, "_primus_bridge", False):
        return

    def read_metadata(self, *args, **kwargs):
        rank = kwargs.get("rank")
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        path = self.fs.concat_path(self.path, name)
        with self.fs.create_stream(path, "rb") as stream:
            metadata = read_index(stream, str(path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    read_metadata._primus_bridge = True

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        plain = load_plain(value, f"entry {name} of the checkpoint")
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], plain)
        else:
            self.state_dict[name] = plain

    def load_common(self, checkpoint_dir):
        from megatron.core.dist_checkpointing.core import CheckpointingException

        path = Path(checkpoint_dir) / "common.pt"
        try:
            return load_plain(path, str(path))
        except FileNotFoundError as error:
            raise CheckpointingException(f"Common file {path} does not exist") from error

    # an installed multistorageclient would bring readers of its own; our checkpoints are folders
    MultiStorageClientFeature.disable()
    FileSystemReader.read_metadata = read_metadata
    DefaultLoadPlanner.load_bytes = load_bytes
    TorchCommonLoadStrategy.load_common = load_common


PATCH = Patch(
    id="torch-checkpoint-safe-load",
    package="torch",
    versions=">=2.7,<2.14",
    reason="torch.distributed.checkpoint reads a checkpoint's index and byte entries with an unrestricted pickle",
    remove_when="FileSystemReader.read_metadata and DefaultLoadPlanner.load_bytes unpickle with an allow-list",
    condition=lambda device: (True, "checkpoints may come from others"),
    apply=_apply,
    order=70,
)
