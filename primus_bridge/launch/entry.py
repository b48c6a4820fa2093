"""What a training rank does: the adapter prepares, the registry names the trainer, the trainer runs."""

from __future__ import annotations

import os
from typing import Any

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.run_yaml import from_plain
from primus_bridge.launch.environment import choose_device


def run_rank(arguments: BridgeArguments) -> Any:
    """Train in this rank; its place in the job is in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    from primus_bridge.registry import BackendRegistry

    choose_device(arguments.dist.device)
    adapter = BackendRegistry.get_adapter(arguments.framework)
    adapter.prepare_backend(arguments)
    trainer_class = adapter.load_trainer_class(arguments.stage)
    trainer = trainer_class(
        backend_args=arguments,
        module_name=f"{arguments.stage}_trainer",
        primus_config=None,
        module_rank=int(os.environ["RANK"]),
        module_world_size=int(os.environ["WORLD_SIZE"]),
        module_master_addr=os.environ["MASTER_ADDR"],
        module_master_port=int(os.environ["MASTER_PORT"]),
    )
    return trainer.run()


def run_training(arguments: dict, sources: dict, notes: list) -> None:
    """run_rank for a launcher's payload (see payload)."""
    run_rank(from_plain(arguments, sources, notes))


def payload(arguments: BridgeArguments) -> dict[str, Any]:
    """The arguments as the JSON that run_training takes."""
    return {"arguments": arguments.to_dict(), "sources": arguments.sources, "notes": arguments.notes}
