"""The state of a training run, declared: what a checkpoint holds of it, and how ranks share each piece."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Optional

from primus_bridge.checkpoint.components import SharingPattern, StateComponent
from primus_bridge.nonfinite import NonFinite
from primus_bridge.trainers.rank import RankTrainer

if TYPE_CHECKING:
    from primus_bridge.callbacks.base import CallbackList
    from primus_bridge.checkpoint.manifest import Manifest
    from primus_bridge.checkpoint.start import StartingPoint
    from primus_bridge.data.loader import Loader
    from primus_bridge.megatron.parallel import Parallel


@dataclass
class TrainerState:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences of those steps, and of those that a rollback took back."""
    nonfinite: NonFinite = field(default_factory=NonFinite)
    """Steps whose loss or gradient was no finite number."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state, nonfinite=NonFinite(**state["nonfinite"]))


class DataPosition:
    """Where the loader goes on: epoch, sequence and what else it needs; the same at any layout."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load(state)


class StatefulTrainer(RankTrainer):
    """A trainer that says what its state is; until ``setup`` and ``init`` have made the parts, of empty ones."""

    start: StartingPoint
    parallel: Parallel
    loader: Loader
    told: CallbackList
    chunks: list = []
    optimizer: Any = None
    scheduler: Any = None
    lora: Any = None
    base_digest: Optional[str] = None
    """Of the weights under this run's adapter; known to rank 0."""

    @cached_property
    def progress(self) -> TrainerState:
        """How far the run has come, by the checkpoint that began last."""
        return TrainerState()

    @cached_property
    def _more_state(self) -> list[StateComponent]:
        return []

    def add_state_component(self, component: StateComponent) -> None:
        """One more piece of state in this run's checkpoints; before ``init``, on every rank.

        A callback with state_dict and load_state_dict needs no such line: what rank 0 has of it is saved.
        """
        self._more_state.append(component)

    def get_state_components(self) -> list[StateComponent]:
        """Everything that a checkpoint of this run holds.

        Data-parallel ranks share a part of the model; with Megatron's distributed optimizer each has its own part of
        the optimizer's state. Without save_optim only the model of it is saved.
        """
        from primus_bridge.megatron.rng import RankRNG
        from primus_bridge.megatron.sharded_state import ModelState, OptimizerState

        arguments, torch_dist = self.arguments, {"format": "torch_dist"}
        model = ModelState(self.chunks, trainable_only=self.lora is not None)
        components = [
            StateComponent(
                "model",
                model,
                SharingPattern.PER_GROUP,
                process_group_name="dp_group",
                validate_replication=True,
                metadata=torch_dist,
            )
        ]
        optimizer = OptimizerState(self.optimizer, model)
        if arguments.ddp.use_distributed_optimizer:
            components.append(StateComponent("optimizer", optimizer, SharingPattern.PER_RANK, metadata=torch_dist))
        else:
            components.append(
                StateComponent(
                    "optimizer",
                    optimizer,
                    SharingPattern.PER_GROUP,
                    process_group_name="dp_group",
                    # the experts' state is shared out over data-parallel ranks
                    validate_replication=hasattr(self, "parallel") and self.parallel.ep_size == 1,
                    metadata=torch_dist,
                )
            )
        equal: dict[str, Any] = {"validate_replication": True, "validation_level": "tensor"}
        pattern = self._get_dataset_sharing_pattern()
        return [
            *components,
            StateComponent("scheduler", self.scheduler, SharingPattern.REPLICATED, **equal),
            StateComponent("trainer", self.progress, SharingPattern.REPLICATED, **equal),
            StateComponent("dataset", DataPosition(self.loader) if hasattr(self, "loader") else None, pattern, **equal),
            StateComponent("rng", RankRNG(arguments.rng.seed), SharingPattern.PER_RANK),
            *self._callbacks_state(),
            *self._more_state,
        ]

    def _callbacks_state(self) -> list[StateComponent]:
        """Of callbacks that have any, which live on rank 0; the other ranks only know their names. Collective."""
        from primus_bridge.checkpoint.components import Stateful
        from primus_bridge.together import from_rank_0

        if not hasattr(self, "told"):
            return []
        stateful: dict[str, Any] = {}
        for callback in [*self.told.callbacks, *self.callbacks]:
            if isinstance(callback, Stateful) and callback not in stateful.values():
                name = type(callback).__name__
                number = sum(key.partition("-")[0] == name for key in stateful) + 1
                stateful[f"{name}-{number}"] = callback
        names = from_rank_0(lambda: list(stateful))
        return [
            StateComponent(f"callback-{name}", stateful.get(name), SharingPattern.GLOBAL, required=False)
            for name in names
        ]

    def get_process_groups(self) -> dict[str, Any]:
        """tp_group, pp_group, dp_group (with context parallelism), cp_group, mp_group, ep_group, edp_group."""
        return self.parallel.groups if hasattr(self, "parallel") else {}

    def manifest(self) -> Manifest:
        """Of the checkpoint of ``progress.step``."""
        from primus_bridge.checkpoint.changes import arguments_digest
        from primus_bridge.checkpoint.manifest import Manifest
        from primus_bridge.megatron.model import params_dtype

        arguments, start = self.arguments, self.start
        return Manifest(
            step=self.progress.step,
            contents="adapter" if self.lora else "model",
            training_state=arguments.checkpoint.save_optim,
            params_dtype=str(params_dtype(arguments)).removeprefix("torch."),
            model_type=start.model.architecture.model_type,
            stage=self.stage,
            layout=self.parallel.layout,
            base=start.base_name,
            base_digest=self.base_digest,
            peft=asdict(arguments.peft) if self.lora else None,
            adapter=start.adapter,
            consumed_samples=self.progress.consumed_samples,
            arguments=arguments.to_dict(),
            arguments_digest=arguments_digest(arguments),
        )
