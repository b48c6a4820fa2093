"""Our adapter inside a real Primus: its registry, what its runtime asks of an adapter and a trainer, its command line.

python -m primus_bridge.integrations.primus train posttrain --config exp.yaml      its runtime, in this process
primus-cli direct --script .../primus_bridge/integrations/primus.py -- train posttrain --config exp.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # run as a file, it would itself be what 'import primus' finds

import builtins
import functools
import importlib
import importlib.util
import os
import traceback
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Iterator, Optional

from primus_bridge.adapter import MegatronBridgeAdapter, as_dict
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError

FRAMEWORK = "megatron_bridge"
TRAINER_OF_SUITE = {"pretrain": "pre_trainer", "posttrain": "post_trainer"}
"""The module that ``primus train SUITE`` runs."""


def host_folder() -> Optional[Path]:
    """The package folder of the Primus that can be imported, None without one. Nothing of it is imported."""
    spec = importlib.util.find_spec("primus")
    for location in (spec.submodule_search_locations if spec else None) or ():
        if (Path(location) / "cli" / "main.py").is_file():
            return Path(location)
    return None


def host_commands() -> list[str]:
    """The commands of that Primus, [] without one."""
    folder = host_folder()
    found = (folder / "cli" / "subcommands").glob("*.py") if folder is not None else ()
    return sorted(path.stem for path in found if not path.name.startswith("_"))


def takes(words: list[str]) -> bool:
    """Whether a command line is for the Primus that can be imported rather than for us.

    Its commands are, but for ``train``, and so are options before a command. ``train`` is ours with ``--framework``,
    and where the module that it would run is one of ours.
    """
    if host_folder() is None or not words:
        return False
    if words[0] != "train":
        return words[0].startswith("-") or words[0] in host_commands()
    from primus_bridge.cli.train import take, take_stage

    suite, rest = take_stage(words[1:])
    if suite not in TRAINER_OF_SUITE or take(rest, "framework")[0] is not None:
        return False
    return _runs_other_framework(_experiment(words), TRAINER_OF_SUITE[suite])


def _experiment(words: list[str]) -> list[Any]:
    """The file of a ``train`` command as its ``extends`` chain, bases first; [] where none can be read."""
    from primus_bridge.cli.train import take_config
    from primus_bridge.config.presets import load_chain

    config, _ = take_config(words)
    if config is None or "train" not in words:
        return []
    try:
        return load_chain(config)
    except ConfigError:
        return []  # who runs the file says what is wrong with it


def _runs_other_framework(trees: list[Any], trainer: str) -> bool:
    """Whether the module that Primus runs for ``trainer`` is of another framework.

    Where no module has that name, the file is ours when any of them is.
    """
    from primus_bridge.config.yaml_file import plain

    frameworks: dict[str, Any] = {}
    for tree in trees:
        modules = plain(tree.value["modules"]) if "modules" in tree.value else None
        for name, module in (modules or {}).items():
            if isinstance(module, dict) and "framework" in module:
                frameworks[name] = module["framework"]
    if trainer in frameworks:
        return frameworks[trainer] != FRAMEWORK
    return bool(frameworks) and FRAMEWORK not in frameworks.values()


def register() -> type:
    """Put our adapter into Primus's registry for megatron_bridge, now and for good; the adapter class.

    A second call changes nothing. Primus's own backend registers itself when something imports it, and no longer takes
    the place back. Raises ConfigError when no Primus can be imported.
    """
    folder = host_folder()
    if folder is None:
        raise ConfigError("no Primus can be imported: install it, or put its checkout on PYTHONPATH")
    try:
        registry = _host("core.backend.backend_registry").BackendRegistry
        adapter = _adapter_class(_host("core.backend.backend_adapter").BackendAdapter)
    except ImportError as error:
        raise ConfigError(f"this Primus cannot take an adapter ({error}); v26.5 can", where=str(folder)) from error
    registry.register_adapter(FRAMEWORK, adapter)
    if not hasattr(registry.register_adapter, "keeps"):
        registry.register_adapter = classmethod(_keeping(registry.register_adapter.__func__))
    return adapter


def _keeping(register_adapter: Any) -> Any:
    @functools.wraps(register_adapter)
    def keeping(cls: Any, backend: str, adapter_cls: type) -> None:
        if backend != FRAMEWORK or issubclass(adapter_cls, PrimusAdapter):
            register_adapter(cls, backend, adapter_cls)

    keeping.keeps = FRAMEWORK  # type: ignore[attr-defined]
    return keeping


@functools.cache
def _adapter_class(host_base: type) -> type:
    return type("PrimusAdapter", (PrimusAdapter, host_base), {"__doc__": PrimusAdapter.__doc__})


def _host(module: str) -> Any:
    return importlib.import_module(f"primus.{module}")


class PrimusAdapter:
    """Our adapter with the signatures and the types of Primus's BackendAdapter, which ``register`` makes its base."""

    def __init__(self, framework: str = FRAMEWORK):
        self.framework = framework
        self.third_party_dir_name: Optional[str] = None
        self.ours = MegatronBridgeAdapter(framework)  # of the engine that prepare_backend finds in the settings

    def load_trainer_class(self, stage: str = "pretrain", trainer_class: Optional[str] = None) -> type:
        """The trainer of the stage, or the one at a dotted path, in the shape that Primus's runtime calls."""
        return _trainer_class(self.ours.load_trainer_class(stage, trainer_class))

    def convert_config(self, params: Any) -> SimpleNamespace:
        """A module's merged settings -> the typed arguments as a namespace, of which the trainer makes them again."""
        return as_namespace(self.ours.convert_config(params))

    def setup_backend_path(self, backend_path: Any = None) -> str:
        """Put ``backend_path``, else BACKEND_PATH, on sys.path; without either Megatron-Core is the installed one."""
        path = backend_path or os.environ.get("BACKEND_PATH")
        if path:
            self.ours.setup_backend_path(path)
        return str(path or "")

    def prepare_backend(self, config: Any) -> None:
        """The hooks that others registered for this backend; then the device, and the patches for it."""
        from primus_bridge.launch.environment import choose_device
        from primus_bridge.launch.local import quiet_upstream
        from primus_bridge.registry import BRIDGE_ENGINE, BackendRegistry

        _host("core.backend.backend_registry").BackendRegistry.run_setup(self.framework)
        arguments = self.ours.convert_config(config.params)
        if arguments.engine == "bridge":
            self.ours = BackendRegistry.get_adapter(BRIDGE_ENGINE)
        quiet_upstream()
        choose_device(arguments.dist.device)
        self.ours.prepare_backend(arguments)

    def detect_backend_version(self) -> str:
        """The version of the installed Megatron-Core, or of the other engine."""
        return self.ours.detect_backend_version()


def as_namespace(arguments: BridgeArguments) -> SimpleNamespace:
    """The arguments as Primus's runtime takes them: a namespace of a namespace a section.

    The runtime logs it and merges the module's own settings into it, and patches of its ``build_args`` phase may change
    it. ``sources`` has the arguments that are not defaults.
    """
    sections = arguments.to_dict()
    sources = {name: source for name, source in arguments.sources.items() if source != "default"}
    spaces = {name: SimpleNamespace(**value) if isinstance(value, dict) else value for name, value in sections.items()}
    return SimpleNamespace(**spaces, sources=sources, notes=list(arguments.notes))


def as_arguments(namespace: SimpleNamespace) -> BridgeArguments:
    """The reverse of ``as_namespace``. Raises ConfigError for a value of the wrong type."""
    from primus_bridge.config import schema
    from primus_bridge.config.run_yaml import from_plain

    values = as_dict(namespace)
    sections = {name: values[name] for name in BridgeArguments().to_dict()}
    return from_plain(sections, dict.fromkeys(schema.fields(), "default") | values["sources"], values["notes"])


@functools.cache
def _trainer_class(trainer: type) -> type:
    """``trainer`` as Primus's runtime calls it."""

    class HostedTrainer(trainer):
        """Takes the namespace of ``convert_config``, saves in the experiment's folder, speaks through Primus's log."""

        def __init__(self, backend_args: SimpleNamespace, primus_config: Any = None, **place: Any):
            arguments = as_arguments(backend_args)
            if arguments.checkpoint.save is None and primus_config is not None:
                from primus_bridge.config import schema

                where = "Primus experiment (workspace/work_group/user_name/exp_name)"
                schema.put(arguments, "checkpoint.save", str(primus_config.exp_root_path), where)
            super().__init__(backend_args=arguments, primus_config=primus_config, **place)
            self.backend_args = backend_args
            self.host_joined = False

        def setup(self) -> None:
            import torch.distributed as dist

            self.host_joined = dist.is_initialized()
            with _print_is_information():
                self.say(*(f"note: {note}" for note in self.arguments.notes))
                super().setup()

        def init(self) -> None:
            with _print_is_information():
                super().init()

        def train(self) -> Any:
            with _print_is_information():
                return super().train()

        def cleanup(self, on_error: bool = False) -> None:
            if not self.host_joined:
                super().cleanup(on_error)
                return
            super().cleanup(on_error=True)  # which leaves the process group alone: it is the host's, and stays
            if not on_error:
                from primus_bridge.megatron.parallel import destroy_model_parallel

                destroy_model_parallel()

    HostedTrainer.__name__ = HostedTrainer.__qualname__ = trainer.__name__
    return HostedTrainer


@contextmanager
def _print_is_information() -> Iterator[None]:
    """Primus makes ``print`` a line for debugging, which its terminal does not show; what a run says is information."""
    log = _host("core.utils.module_utils").log_rank_all

    def inform(*values: Any, sep: Optional[str] = " ", **_ignored: Any) -> None:
        for line in (" " if sep is None else sep).join(map(str, values)).splitlines():
            log(line)

    before = builtins.print
    builtins.print = inform
    try:
        yield
    finally:
        builtins.print = before


def main(argv: Optional[list[str]] = None) -> int:
    """Primus's command line with our adapter in its registry; the exit code, 2 for what the user can mend."""
    words = sys.argv[1:] if argv is None else list(argv)
    register()
    _refuse_dropped_keys(words)
    command_line, before = _host("cli.main"), (sys.argv, builtins.print)
    sys.argv = ["primus", *words]
    try:
        command_line.main()
    except SystemExit as end:
        ended = end
    else:
        return 0
    finally:
        sys.argv, builtins.print = before  # its runtime replaces print, too
    if ended.code == 1:  # a run that failed; a wrong command line is 2, and was told
        _show(ended.__context__)
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _refuse_dropped_keys(words: list[str]) -> None:
    """Raise ConfigError for settings beside ``modules``, which Primus drops, in an experiment of ours."""
    from primus_bridge.config.primus import check_root_keys, is_experiment

    trees = _experiment(words)
    suite = next((word for word in words if word in TRAINER_OF_SUITE), "posttrain")
    if is_experiment(trees) and not _runs_other_framework(trees, TRAINER_OF_SUITE[suite]):
        check_root_keys(trees)


def _show(failure: Optional[BaseException]) -> None:
    """Say why a run ended, which Primus's runtime does in its log files only; our ConfigError is raised."""
    error = failure
    while error is not None:
        if isinstance(error, ConfigError):
            raise error from None
        error = error.__cause__
    if failure is not None:
        traceback.print_exception(failure)


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded
    from primus_bridge.integrations import primus  # this module under its own name, as others import it

    sys.exit(guarded(primus.main))
