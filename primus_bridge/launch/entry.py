"""What a training rank does: the adapter prepares, the registry names the trainer, the trainer runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.run_yaml import from_plain
from primus_bridge.launch.environment import choose_device
from primus_bridge.launch.signals import asked_to_end

if TYPE_CHECKING:
    from primus_bridge.callbacks.base import Callback
    from primus_bridge.checkpoint.components import StateComponent


def run_rank(
    arguments: BridgeArguments, callbacks: Sequence[Callback] = (), components: Sequence[StateComponent] = ()
) -> Any:
    """Train in this rank; its place in the job is in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    callbacks: more than the arguments name. components: more state for the run's checkpoints. Returns its result.
    """
    choose_device(arguments.dist.device)
    if arguments.engine == "bridge":  # which has its own way with signals
        return _run_trainer(arguments, callbacks, components)
    # not only from the trainer's own run on: to import what a run needs takes seconds
    with asked_to_end():
        return _run_trainer(arguments, callbacks, components)


def _run_trainer(
    arguments: BridgeArguments, callbacks: Sequence[Callback], components: Sequence[StateComponent]
) -> Any:
    from primus_bridge.registry import BRIDGE_ENGINE, BackendRegistry

    adapter = BackendRegistry.get_adapter(BRIDGE_ENGINE if arguments.engine == "bridge" else arguments.framework)
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
    if callbacks:
        trainer.callbacks.extend(callbacks)
    for component in components:
        trainer.add_state_component(component)
    return trainer.run()


def run_training(arguments: dict, sources: dict, notes: list) -> None:
    """run_rank for a launcher's payload (see payload)."""
    run_rank(from_plain(arguments, sources, notes))


def payload(arguments: BridgeArguments) -> dict[str, Any]:
    """The arguments as the JSON that run_training takes."""
    return {"arguments": arguments.to_dict(), "sources": arguments.sources, "notes": arguments.notes}
