"""Checks before anything is started or written: model folder, checkpoint, layout, adapters, data and output folders."""

from __future__ import annotations

from pathlib import Path

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_writable


def check(arguments: BridgeArguments) -> None:
    """Raises ConfigError for what would stop the run later. Reads headers and small files only; writes nothing."""
    from primus_bridge.checkpoint.start import starting_point
    from primus_bridge.conversion.hf_folder import parse_size
    from primus_bridge.conversion.model_folder import check_layout
    from primus_bridge.data.sources import Source

    checkpoint = arguments.checkpoint
    check_writable(arguments.save_folder, "the save folder")
    if checkpoint.convert_to_hf:
        parse_size(checkpoint.max_shard_size)
        check_export_folder(Path(checkpoint.hf_save_path or arguments.save_folder / "hf"))
    start = starting_point(arguments)
    check_layout(start.model.architecture, arguments.model)
    if start.hf_weights:
        start.model.weights()
    if arguments.peft.scheme is not None:
        from primus_bridge.peft.targets import adapted_parts

        adapted_parts(arguments.peft.target_modules)
    dataset = arguments.dataset
    assert dataset.data_path is not None  # validated
    Source(dataset.data_path, split=dataset.split)  # opening it checks that it is there
    if dataset.validation_data_path is not None:
        Source(dataset.validation_data_path, key="dataset.validation_data_path")


def check_export_folder(folder: Path) -> None:
    """Raises ConfigError when an export there would overwrite something that is not an export."""
    check_writable(folder, "the export folder")
    if folder.is_dir() and any(folder.iterdir()):
        known = ("config.json", "adapter_config.json")
        if not any((folder / name).is_file() for name in known):
            raise ConfigError("is not empty and holds no earlier export; give another folder", where=str(folder))
