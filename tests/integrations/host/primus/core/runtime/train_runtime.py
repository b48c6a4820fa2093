"""One module: its settings to the adapter, the trainer through its phases, an error to its cleanup."""

import ast
import builtins
import os
from types import SimpleNamespace

from primus.core.backend.backend_registry import BackendRegistry
from primus.core.config.primus_config import load_primus_config
from primus.core.utils.module_utils import debug_rank_all, log_rank_all


class PrimusRuntime:
    def run_train_module(self, config, module_name, overrides):
        trainer = None
        try:
            primus_config = load_primus_config(config)
            module_config = next(module for module in primus_config.modules if module.name == module_name)
            for word in overrides:
                key, _, text = word.partition("=")
                try:
                    setattr(module_config.params, key, ast.literal_eval(text))
                except (ValueError, SyntaxError):
                    setattr(module_config.params, key, text)
            builtins.print = debug_rank_all
            adapter = BackendRegistry.get_adapter(module_config.framework)
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
