"""RankTrainer: what a trainer of any engine is made of, in one rank of a job: the arguments and the rank's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from primus_bridge.config.arguments import BridgeArguments

if TYPE_CHECKING:
    from primus_bridge.callbacks.base import Callback
    from primus_bridge.checkpoint.components import SharingPattern, StateComponent


class RankTrainer:
    """The constructor keywords of Primus's trainer protocol; a subclass has ``run()``."""

    stage = ""

    def __init__(
        self,
        backend_args: BridgeArguments,
        module_name: str = "trainer",
        primus_config: Any = None,
        module_rank: int = 0,
        module_world_size: int = 1,
        module_master_addr: str = "127.0.0.1",
        module_master_port: int = 0,
    ):
        self.arguments = backend_args
        self.module_name = module_name
        self.primus_config = primus_config
        self.rank = module_rank
        self.world_size = module_world_size
        self.master_addr = module_master_addr
        self.master_port = module_master_port
        self.callbacks: list[Callback] = []
        """More callbacks than the arguments name, for a Python caller to add to."""

    def add_state_component(self, component: StateComponent) -> None:
        """Raises ConfigError: an engine with checkpoints of its own has no place for it."""
        from primus_bridge.errors import ConfigError

        raise ConfigError(
            "this engine's checkpoints hold no other state; engine: core does",
            where=f"state component {component.key!r}",
        )

    def get_state_components(self) -> list[StateComponent]:
        """What a checkpoint of this run holds; nothing, where an engine has checkpoints of its own."""
        return []

    def get_process_groups(self) -> dict[str, Any]:
        """This rank's process groups by the names that components give."""
        return {}

    def _get_dataset_sharing_pattern(self) -> SharingPattern:
        """Every rank counts through the whole data in the same order and takes its own part of each batch."""
        from primus_bridge.checkpoint.components import SharingPattern

        return SharingPattern.REPLICATED
