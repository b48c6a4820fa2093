"""For Python processes with Megatron-Bridge and without CUDA: one that has this folder on its path has "CUDA devices".

They are the CPU: our patches of megatron.core for it, and the same rewriting of megatron.bridge; NCCL is gloo. What
compiled packages the bridge imports is answered by names that compute nothing (tests/benchmarks/bridge_stand_ins.py):
the layers are megatron.core's own, the configuration, the loop, the loss, LoRA and the checkpoints are the bridge's.
PRIMUS_TEST_CUDA_DEVICES: how many devices; without it nothing is changed.
"""

import os


def _stand_in() -> None:
    import importlib.machinery
    import sys
    import types
    import typing

    import typing_extensions

    typing.override = typing_extensions.override  # megatron-bridge 0.6 is for Python 3.12

    from tests.benchmarks import bridge_stand_ins

    absent = (
        "transformer_engine triton modelopt nvidia_resiliency_ext mamba_ssm causal_conv1d flashinfer "
        "fast_hadamard_transform qwen_vl_utils timm open_clip fla"
    ).split()

    class Absent:
        """Any name of the packages that are compiled for CUDA."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] not in absent and not name.startswith("megatron.energon"):
                return None
            return importlib.machinery.ModuleSpec(name, Absent, is_package=True)

        @staticmethod
        def create_module(spec):
            module = types.ModuleType(spec.name)
            module.__version__, module.__getattr__ = "2.10.0", bridge_stand_ins.any_name
            if spec.name == "modelopt.torch.distill.plugins.megatron":
                module.get_tensor_shapes_adjust_fn_for_distillation = lambda *_, **__: None
            return module

        @staticmethod
        def exec_module(module):
            pass

    import importlib.metadata

    if importlib.metadata.version("megatron-core").startswith("0.16."):
        _train_on_cpu()
    sys.meta_path.insert(0, Absent)
    if importlib.metadata.version("megatron-core").startswith("0.16."):
        _layers_of_core()


def _train_on_cpu() -> None:
    import importlib.machinery
    import sys

    from primus_bridge.patches import megatron_core_cpu_device

    from primus_bridge.patching import apply_patches

    class Rewritten:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if not name.startswith("megatron.bridge"):
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                spec.loader = megatron_core_cpu_device._Loader(spec.loader)
            return spec

    sys.meta_path.insert(0, Rewritten)
    apply_patches("cpu")

    # without Transformer Engine: so its probes for it say
    import megatron.core.datasets.utils
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import torch
    import torch.distributed as dist

    megatron.core.datasets.utils.compile_helpers = lambda: None  # the wheel has no Makefile for it
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ["PRIMUS_TEST_CUDA_DEVICES"])
    cuda.set_device = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *_: 0
    cuda.memory_reserved = cuda.max_memory_reserved = lambda *_: 0
    cuda.memory_stats = lambda *_: {}
    start = dist.init_process_group

    def on_gloo(backend=None, **options):
        options.pop("device_id", None)
        return start(backend="gloo", **options)

    dist.init_process_group = on_gloo


def _layers_of_core() -> None:
    from megatron.bridge.models import gpt_provider, transformer_config
    from megatron.bridge.peft import utils as peft_utils

    peft_utils.HAVE_TE = False
    finalize = transformer_config.TransformerConfig.finalize
    fusions = (
        "apply_rope_fusion bias_activation_fusion bias_dropout_fusion masked_softmax_fusion persist_layer_norm "
        "gradient_accumulation_fusion cross_entropy_loss_fusion"
    ).split()

    def without_kernels(self):
        self.transformer_layer_spec = gpt_provider.local_layer_spec
        for name in fusions:
            setattr(self, name, False)
        finalize(self)

    transformer_config.TransformerConfig.finalize = without_kernels


if os.environ.get("PRIMUS_TEST_CUDA_DEVICES"):
    _stand_in()
