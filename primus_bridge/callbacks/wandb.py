"""WandBCallback: metrics, arguments with their sources and a summary to Weights & Biases, online or offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Optional

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.callbacks.summary import summarise
from primus_bridge.callbacks.values import checked
from primus_bridge.callbacks.wandb_login import check_login, check_package, settled_mode
from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from primus_bridge.files import write_text, writing

WHO = "WandBCallback"
RUN_ID = "run_id.txt"
"""SAVE/wandb/run_id.txt: the run that a resumed job goes on with."""


class WandBCallback(Callback):
    """project, entity, name, mode: by default logger.wandb_project, wandb_entity, wandb_exp_name (the save folder's
    name without one) and wandb_mode. config: more entries beside the arguments. Raises ConfigError for any other value.

    Metrics have TensorBoard's names (train/loss, eval/loss) over ``step``. A resumed run goes on under its id, and a
    run that ends with an error is marked failed. logger.wandb: false (--no-wandb) or mode "disabled" switches it off.
    A service that is lost on the way is said once, and the run goes on without it.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        config: dict[str, Any] | None = None,
    ):
        self.project = checked(WHO, "project", Optional[str], project)
        self.entity = checked(WHO, "entity", Optional[str], entity)
        self.name = checked(WHO, "name", Optional[str], name)
        self.mode = checked(WHO, "mode", Optional[Literal["online", "offline", "disabled"]], mode)
        self.config = checked(WHO, "config", Optional[schema.MAPPING], config)
        self._run: Any = None

    def check(self, arguments: BridgeArguments) -> None:
        mode = self._mode(arguments)
        if mode != "disabled":
            check_package()
        if mode == "online":
            check_login(logger_source(arguments) or WHO)

    def on_train_start(self, state: RunState) -> None:
        logger, save = state.arguments.logger, state.arguments.save_folder
        if self._mode(state.arguments) == "disabled":
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
                mode=self.mode or logger.wandb_mode,
                id=_id_of(id_file) if state.step else None,
                resume="allow",
                dir=str(save),
                config={**state.arguments.to_dict(), "sources": state.arguments.sources, **(self.config or {})},
            )
            # a run resumed from an older checkpoint gives some steps again, and wandb's own step never goes back
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # a wrong key, no network, a project that is not there: wandb has a class for each
            raise ConfigError(
                f"Weights & Biases does not start: {error}; log in with `wandb login`, keep the run here with "
                "--wandb_mode offline, or leave it out with --no-wandb",
                where=logger_source(state.arguments) or WHO,
            ) from error
        with writing("the run's files", save):
            write_text(id_file, self._run.id)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._log("train", metrics)

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._log("eval", metrics)

    def on_error(self, state: RunState, error: BaseException) -> None:
        self._finish(state, 1, error=f"{type(error).__name__}: {error}")

    def on_train_end(self, state: RunState) -> None:
        self._finish(state, 0)

    def _mode(self, arguments: BridgeArguments) -> str:
        if arguments.logger.wandb is False:
            return "disabled"
        return settled_mode(self.mode or arguments.logger.wandb_mode)

    def _log(self, group: str, metrics: dict[str, Any]) -> None:
        if self._run is None or not metrics:
            return
        named = {f"{group}/{key.removeprefix('eval_')}": value for key, value in metrics.items() if key != "step"}
        with self._while_there():
            self._run.log({"step": metrics["step"], **named})

    def _finish(self, state: RunState, exit_code: int, **more: Any) -> None:
        self._log("train", state.unlogged)
        if self._run is None:
            return
        history = read_history(state.arguments.save_folder / METRICS_FILE)
        summary = {**summarise(history), "steps": state.step, **more}
        if state.stop_reason is not None:
            summary["stopped"] = state.stop_reason
        with self._while_there():
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)
        self._run = None

    @contextmanager
    def _while_there(self) -> Iterator[None]:
        """Let go of the run when its service is lost: that is not worth a training, whose numbers are in SAVE too."""
        try:
            yield
        except Exception as error:  # of a lost service: whatever its socket raises
            self._run = None
            told = f"{type(error).__name__}: {error}"
            print(f"Weights & Biases lost: {told}; the run goes on, {METRICS_FILE} has everything", flush=True)
            with suppress(Exception):  # or wandb looks for its service again when Python ends, and in the next run
                import wandb

                wandb.teardown()


def logger_source(arguments: BridgeArguments) -> str | None:
    """Where the arguments ask for logging there; None where they do not."""
    sources = (arguments.sources.get(f"logger.{name}", "default") for name in ("wandb_project", "wandb"))
    return next((source for source in sources if source != "default"), None)


def _id_of(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
