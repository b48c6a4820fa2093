"""Checks before anything is started or written: model folder, checkpoint, layout, adapters, data and output folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.files import check_writable

if TYPE_CHECKING:
    from primus_bridge.checkpoint.start import StartingPoint


def export_folder(arguments: BridgeArguments) -> Path:
    """Where convert_to_hf writes."""
    return Path(arguments.checkpoint.hf_save_path or arguments.save_folder / "hf")


def check(arguments: BridgeArguments) -> StartingPoint:
    """Raises ConfigError for what would stop the run later. Reads headers and small files only; writes nothing.

    Returns where the run starts.
    """
    from primus_bridge.checkpoint.start import starting_point
    from primus_bridge.conversion.hf_folder import check_export_folder, parse_size
    from primus_bridge.conversion.model_folder import check_layout
    from primus_bridge.data.sources import Source

    checkpoint, dataset = arguments.checkpoint, arguments.dataset
    assert dataset.data_path is not None  # validated
    check_writable(arguments.save_folder, "the save folder")
    start = starting_point(arguments)
    if checkpoint.convert_to_hf:
        parse_size(checkpoint.max_shard_size)
        apart = {
            "the run's save folder": arguments.save_folder,
            "the checkpoint": checkpoint.load,
            "the pretrained checkpoint": checkpoint.pretrained_checkpoint,
            "the model": start.model.folder,
        }
        check_export_folder(export_folder(arguments), apart)
    check_layout(start.model.architecture, arguments.model)
    if start.hf_weights:
        start.model.weights()
    if arguments.peft.scheme is not None:
        from primus_bridge.peft.plan import adapter_plan

        adapter_plan(arguments.peft, start.model, start.adapter)
    Source(dataset.data_path, split=dataset.split)  # opening it checks that it is there
    if dataset.validation_data_path is not None:
        Source(dataset.validation_data_path, key="dataset.validation_data_path")
    return start
