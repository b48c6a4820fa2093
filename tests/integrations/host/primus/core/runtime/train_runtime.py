"""One module: its settings to the adapter, the trainer through its phases, an error to its cleanup."""

import ast
import builtins
import os
from pathlib import Path
from types import SimpleNamespace

import yaml

from primus.core.backend.backend_registry import BackendRegistry
from primus.core.utils.module_utils import debug_rank_all, log_rank_all


def nested(value):
    return SimpleNamespace(**{k: nested(v) for k, v in value.items()}) if isinstance(value, dict) else value


class PrimusRuntime:
    def run_train_module(self, config, module_name, overrides):
        trainer = None
        try:
            experiment = yaml.safe_load(Path(config).read_text())
            place = [experiment[key] for key in ("workspace", "work_group", "user_name", "exp_name")]
            primus_config = SimpleNamespace(exp_root_path=os.path.join(*place))
            module = experiment["modules"][module_name]
            params = {"name": module_name, "model": module["model"], "sink_level": None, **module["overrides"]}
            for word in overrides:
                key, _, text = word.partition("=")
                try:
                    params[key] = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    params[key] = text
            module_config = SimpleNamespace(params=nested(params))
            builtins.print = debug_rank_all
            adapter = BackendRegistry.get_adapter(module["framework"])
            adapter.setup_backend_path(backend_path=None)
            adapter.prepare_backend(module_config)
            backend_args = adapter.convert_config(module_config.params)
            log_rank_all(f"backend args: {', '.join(sorted(vars(backend_args)))}")
            for key, value in vars(module_config.params).items():
                if key not in vars(backend_args):
                    setattr(backend_args, key, value)
            backend_args.rng.seed = int(os.environ.get("BUILD_ARGS_PATCH_SEED", backend_args.rng.seed))
            named = getattr(module_config.params, "trainer_class", None)
            trainer = adapter.load_trainer_class(
                stage=getattr(backend_args, "stage", "pretrain"), **({"trainer_class": named} if named else {})
            )(
                backend_args=backend_args,
                module_name=module_name,
                primus_config=primus_config,
                module_rank=int(os.environ.get("RANK", 0)),
                module_world_size=int(os.environ.get("WORLD_SIZE", 1)),
                module_master_addr=os.environ.get("MASTER_ADDR", "127.0.0.1"),
                module_master_port=int(os.environ.get("MASTER_PORT", 1024)),
            )
            from torch import distributed as dist

            trainer.runtime_state = SimpleNamespace()
            if "HOST_JOINS" in os.environ:
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            for phase in ("setup", "init", "train", "cleanup"):
                log_rank_all(f"{phase} of {type(trainer).__name__} on {adapter.detect_backend_version()}")
                getattr(trainer, phase)()
            log_rank_all(f"the group is there: {dist.is_initialized()}")
        except BaseException as error:
            if trainer is not None:
                trainer.cleanup(on_error=True)
            raise RuntimeError(f"Training execution failed: {error}") from error
