"""Weights between Hugging Face folders and Megatron-Bridge's checkpoints, each in a process of its own.

    python -m primus_bridge.bridge.weights import HF_FOLDER CHECKPOINT DTYPE
    python -m primus_bridge.bridge.weights export HF_FOLDER CHECKPOINT OUT

AutoBridge makes a world of one rank for either, which the ranks of a run already are no longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from primus_bridge.bridge.start import Start, find
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from primus_bridge.files import partial_folder, replace_folder


def import_weights(arguments: BridgeArguments, start: Start) -> None:
    """Make ``start.pretrained`` where it is missing: one rank of all nodes does it, the others wait for its lock."""
    if not start.imports:
        return
    from filelock import FileLock

    assert start.pretrained is not None
    start.pretrained.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{start.pretrained}.lock"):
        if find(start.pretrained) is not None:
            return
        dtype = "float32" if arguments.mixed_precision == "fp32" else "bfloat16"
        made = partial_folder(start.pretrained)
        _alone("import", str(start.model.folder), str(made), dtype)
        replace_folder(made, start.pretrained)


def export_weights(start: Start, save: Path, out: Path) -> None:
    """The newest checkpoint under ``save`` as a Hugging Face folder."""
    made = partial_folder(out)
    _alone("export", str(start.model.folder), str(save), str(made))
    replace_folder(made, out)


def _alone(*words: str) -> None:
    """Run this module in a world of one rank. Raises ConfigError with the end of what it printed when it fails."""
    # torchrun's own variables would make this rank look for the store of the job that it is no part of
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC_", "SLURM_"))}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, *words],
        env={**inherited, **alone},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        end = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise ConfigError(f"Megatron-Bridge could not {words[0]} the weights:\n{end}", where=words[1])


def main(words: list[str]) -> None:
    """The process: see above."""
    import torch

    from primus_bridge.bridge.engine import imported, read_safely

    read_safely()
    auto_bridge = imported("megatron.bridge").AutoBridge
    task, hf_folder, checkpoint, last = words
    if task == "import":
        auto_bridge.import_ckpt(hf_folder, checkpoint, torch_dtype=getattr(torch, last))
    else:
        auto_bridge.from_hf_pretrained(hf_folder).export_ckpt(checkpoint, last, show_progress=False)
        _mark(Path(last))


def _mark(folder: Path) -> None:
    """Write into the exported files that they are ours, so that a later export may replace them."""
    from safetensors.torch import load_file, save_file

    from primus_bridge.conversion.safetensors_file import METADATA

    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, metadata=METADATA)


if __name__ == "__main__":
    main(sys.argv[1:])
