"""SFTTrainer: one call from an SFTConfig to a trained model, on one rank or many, with callbacks of the caller's."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from primus_bridge.callbacks.base import Callback
from primus_bridge.callbacks.build import check_objects
from primus_bridge.callbacks.checkpointing import CheckpointCallback
from primus_bridge.checkpoint.components import StateComponent
from primus_bridge.config import BridgeArguments, schema
from primus_bridge.config.validate import check_world, validate
from primus_bridge.errors import ConfigError
from primus_bridge.launch.entry import run_rank
from primus_bridge.sft.config import SFTConfig

if TYPE_CHECKING:
    from primus_bridge.trainers.result import RunResult

WHERE = "SFTTrainer"


class SFTTrainer:
    """Trains ``config`` with the trainers of ``primus train``.

    callbacks: told things on rank 0. With one rank they are the very objects given here; several local ranks are
    processes of their own, spawned from this one, which get copies. state_components: more state for checkpoints, as
    StateComponent("ema", ema, SharingPattern.REPLICATED). Raises ConfigError for anything else.
    """

    def __init__(
        self,
        config: SFTConfig,
        callbacks: Sequence[Callback] | None = None,
        state_components: Sequence[StateComponent] = (),
    ):
        if not isinstance(config, SFTConfig):
            raise ConfigError(
                "config is an SFTConfig: SFTConfig(base_model=..., dataset_name=...), or SFTConfig.from_yaml(path); "
                f"got {config!r}",
                where=WHERE,
            )
        if not isinstance(callbacks, (list, tuple, type(None))):
            raise ConfigError(
                f"callbacks is a list of callbacks, [ValidationCallback(...)]; got {callbacks!r}", where=WHERE
            )
        self.config = config
        self.callbacks = list(callbacks or [])
        self.state_components = list(state_components)
        for component in self.state_components:
            if not isinstance(component, StateComponent):
                raise ConfigError(f"state_components is a list of StateComponent; got {component!r}", where=WHERE)

    def train(self) -> RunResult:
        """The whole run: weights in, training, checkpoints, export. Under torchrun or srun, one rank of that job.

        Raises ConfigError for what the caller can mend, before anything is written; RuntimeError when a spawned rank
        fails, whose traceback is then on stderr.
        """
        from primus_bridge.launch.environment import join_job, quiet_torch
        from primus_bridge.launch.local import launch_function, quiet_upstream, ranks_for
        from primus_bridge.preflight import check_run

        _refuse_to_train_at_import()
        quiet_torch()
        arguments = copy.deepcopy(self.config.arguments)
        _take_output_dir(arguments, self.callbacks)
        validate(arguments)
        check_objects(self.callbacks, arguments)
        if join_job():
            quiet_upstream()
            check_world(arguments, int(os.environ["WORLD_SIZE"]))
            return run_rank(arguments, self.callbacks, self.state_components)
        nproc = ranks_for(arguments)
        if nproc > 1:
            _check_can_be_sent([*self.callbacks, *(component.stateful for component in self.state_components)])
        check_run(arguments)
        for note in arguments.notes:
            print(f"note: {note}")
        return launch_function(run_rank, (arguments, self.callbacks, self.state_components), nproc)


def _take_output_dir(arguments: BridgeArguments, callbacks: Sequence[Callback]) -> None:
    """CheckpointCallback(output_dir) names the save folder of a config that names none."""
    for callback in callbacks:
        if not isinstance(callback, CheckpointCallback) or callback.output_dir is None:
            continue
        if arguments.sources["checkpoint.save"].startswith("default"):
            schema.put(arguments, "checkpoint.save", str(callback.output_dir), "CheckpointCallback(output_dir=...)")
            arguments.notes = [note for note in arguments.notes if not note.startswith("no save is given")]


def _check_can_be_sent(objects: Sequence[Any]) -> None:
    """Raises ConfigError for a callback or a piece of state that a spawned rank could not be given."""
    for callback in objects:
        name = type(callback).__qualname__
        if type(callback).__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise ConfigError(
                f"the ranks cannot import {name} from an interactive session: put it in a module", where=WHERE
            )
        try:
            pickle.dumps(callback)
        except Exception as error:  # pickle has no class for what cannot be pickled
            raise ConfigError(
                f"{name} cannot be sent to the ranks ({error}): define it at the top of a module, and open "
                "files and the like in on_train_start",
                where=WHERE,
            ) from error


def _refuse_to_train_at_import() -> None:
    """End a spawned process that would start the run again: it imports the script that spawned it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        from primus_bridge.launch.rank import refuse

        refuse(
            f"{WHERE}: the script trains whenever it is imported, and every rank imports it: put the call of train() "
            'under if __name__ == "__main__":'
        )
