"""torch.distributed.checkpoint without free unpickling: a checkpoint from somebody else is data, never code.

A torch_dist checkpoint's index, ``.metadata``, is a pickle that torch reads with ``pickle.load``, and its byte entries
go through ``torch.load(weights_only=False)``. Here the first may name only the classes that such an index is made of,
and the second only what torch's own weights-only reader allows. common.pt is read by megatron.core with torch's
default, which is weights-only unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: here it is said aloud.
"""

from __future__ import annotations

import io
from pathlib import Path

from primus_bridge.checkpoint.safe_load import load_plain, read_index
from primus_bridge.patching import Patch


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
