"""WandBCallback: metrics, arguments with their sources and a summary to Weights & Biases, online or offline."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.callbacks.summary import summarise
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from primus_bridge.files import write_text, writing

RUN_ID = "run_id.txt"
"""SAVE/wandb/run_id.txt: the run that a resumed job goes on with."""


class WandBCallback(Callback):
    """project, entity, name, mode: by default logger.wandb_project, wandb_entity, wandb_exp_name (the save folder's
    name without one) and wandb_mode. config: more entries beside the arguments.

    Metrics have TensorBoard's names (train/loss, eval/loss) over ``step``. A resumed run goes on under its id, and a
    run that ends with an error is marked failed. logger.wandb: false (--no-wandb) switches it off.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        self.project, self.entity, self.name, self.mode, self.config = project, entity, name, mode, config
        self._run: Any = None

    def check(self, arguments: BridgeArguments) -> None:
        if arguments.logger.wandb is not False:
            check_wandb()

    def on_train_start(self, state: RunState) -> None:
        logger, save = state.arguments.logger, state.arguments.save_folder
        if logger.wandb is False:
            return
        import wandb

        id_file = save / "wandb" / RUN_ID
        with writing("the run's files", save):
            id_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=self.project or logger.wandb_project,
                entity=self.entity or logger.wandb_entity,
                name=self.name or logger.wandb_exp_name or save.resolve().name,
                mode=self.mode or logger.wandb_mode,  # type: ignore[arg-type]  # checked by wandb
                id=_id_of(id_file) if state.step else None,
                resume="allow",
                dir=str(save),
                config={**state.arguments.to_dict(), "sources": state.arguments.sources, **(self.config or {})},
            )
        except Exception as error:  # no key, no network, a project that is not there: wandb has a class for each
            raise ConfigError(
                f"Weights & Biases does not start: {error}; log in with `wandb login`, keep the run here with "
                "--wandb_mode offline, or leave it out with --no-wandb",
                where=logger_source(state.arguments),
            ) from error
        # a run resumed from an older checkpoint gives some steps again, and wandb's own step never goes back
        self._run.define_metric("*", step_metric="step")
        with writing("the run's files", save):
            write_text(id_file, self._run.id)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._log("train", metrics)

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._log("eval", metrics)

    def on_error(self, state: RunState, error: BaseException) -> None:
        if self._run is not None:
            self._run.summary["error"] = f"{type(error).__name__}: {error}"
        self._finish(state, exit_code=1)

    def on_train_end(self, state: RunState) -> None:
        self._finish(state, exit_code=0)

    def _log(self, group: str, metrics: dict[str, Any]) -> None:
        if self._run is None or not metrics:
            return
        named = {f"{group}/{key.removeprefix('eval_')}": value for key, value in metrics.items() if key != "step"}
        self._run.log({"step": metrics["step"], **named})

    def _finish(self, state: RunState, exit_code: int) -> None:
        if self._run is None:
            return
        summary = {**summarise(read_history(state.arguments.save_folder / METRICS_FILE)), "steps": state.step}
        if state.stop_reason is not None:
            summary["stopped"] = state.stop_reason
        self._run.summary.update(summary)
        self._run.finish(exit_code=exit_code)
        self._run = None


def check_wandb() -> None:
    """Raises ConfigError when the package is missing."""
    with suppress(ImportError):
        import wandb

        if hasattr(wandb, "init"):  # a folder of runs called wandb/ is a package without anything in it
            return
    raise ConfigError(
        "Weights & Biases needs its package: pip install 'primus-bridge[wandb]', or leave it out with --no-wandb",
        where="wandb",
    )


def logger_source(arguments: BridgeArguments) -> str | None:
    """Where logging there was asked for."""
    source = arguments.sources.get("logger.wandb_project", "default")
    return None if source == "default" else source


def _id_of(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
