"""What the ranks of the planner's tests do: build a model, run steps, and say what it really has and took."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass

import torch

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.architecture import Architecture

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def peaks(folder: str, runs: list[tuple[BridgeArguments, int]], steps: int = 2) -> list[int]:
    """Bytes that each (arguments, length of its documents) takes at its peak, beyond what the process has before."""
    from primus_bridge.megatron.parallel import destroy_model_parallel, initialize

    # freed memory goes back at once: else glibc keeps some, by what was freed before
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    libc.mallopt(M_TRIM_THRESHOLD, 64 * 1024)
    found = []
    for arguments, document in runs:
        run = _Run(folder, arguments, initialize(arguments))
        # the libraries' own pages are read when a kernel first runs: they are the process's, not the model's
        run.build()
        batches = micro_batches(run.arch, arguments, document)
        run.step(batches[: arguments.model.pipeline_model_parallel_size])
        run.forget()
        gc.collect()
        libc.malloc_trim(0)
        _reset_peak()
        before = _status("VmRSS")
        run.build()
        for _ in range(steps):
            run.step(batches)
        found.append(_status("VmHWM") - before)
        run.forget()
        destroy_model_parallel()
    return found


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


@dataclass(frozen=True)
class Held:
    """What a rank really has; layers: of each chunk, from 0."""

    stage: int
    layers: list[list[int]]
    embedding: list[bool]
    output: list[bool]
    parameters: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def held(runs: list[tuple[str, BridgeArguments]]) -> list[Held]:
    """Of each (model folder, arguments): this rank's part of the model, of its buffers, and of Adam's states."""
    from primus_bridge.megatron.optimizer import unwrapped
    from primus_bridge.megatron.parallel import destroy_model_parallel, initialize

    found, layout, parallel = [], None, None
    for folder, arguments in runs:
        if layout != _layout(arguments):
            if parallel is not None:
                destroy_model_parallel()
            layout, parallel = _layout(arguments), initialize(arguments)
        run = _Run(folder, arguments, parallel)
        run.build()
        chunks = unwrapped(run.chunks)
        every = [parameter for chunk in chunks for parameter in chunk.parameters()]
        buffers = [b for chunk in run.chunks for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
        frozen = sum(p.numel() * p.element_size() for p in every if not p.requires_grad)
        trained = [p.numel() * p.element_size() for p in every if p.requires_grad]
        distributed = arguments.ddp.use_distributed_optimizer
        weights = sum(b.param_data.nbytes for b in buffers) if distributed else sum(trained)
        found.append(
            Held(
                stage=run.parallel.pp_rank,
                layers=[[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks],
                embedding=[chunk.pre_process for chunk in chunks],
                output=[chunk.post_process for chunk in chunks],
                parameters=sum(p.numel() for p in every),
                trainable=sum(p.numel() for p in every if p.requires_grad),
                weight_bytes=frozen + weights,
                gradient_bytes=sum(b.grad_data.nbytes for b in buffers),
                optimizer_bytes=run.optimizer_bytes(),
            )
        )
        run.forget()
    destroy_model_parallel()
    return found


def _layout(arguments: BridgeArguments) -> tuple:
    model = arguments.model
    return (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        model.context_parallel_size,
        model.expert_model_parallel_size,
        model.expert_tensor_parallel_size,
    )


class _Run:
    """One layout's model, random, as a trainer builds it; joined and left."""

    def __init__(self, folder: str, arguments: BridgeArguments, parallel):
        from primus_bridge.conversion.model_folder import HFModel

        self.arguments = arguments
        self.model = HFModel.open(folder, weights=False)
        self.arch = self.model.architecture
        self.parallel = parallel

    def build(self, to_train: bool = True) -> None:
        from primus_bridge.megatron.model import build_model
        from primus_bridge.megatron.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
        from primus_bridge.peft.build import add_lora
        from primus_bridge.peft.plan import adapter_plan

        chunks = build_model(self.arch, self.arguments, self.parallel)
        with torch.no_grad():
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                parameter.uniform_(-0.02, 0.02)
        if self.arguments.peft.scheme:
            add_lora(chunks, self.arguments.peft, adapter_plan(self.arguments.peft, self.model), seed=1)
        self.chunks = wrap_data_parallel(chunks, self.arguments) if to_train else chunks
        if not to_train:
            return
        self.optimizer = build_optimizer(self.chunks, self.arguments)
        self.scheduler = build_scheduler(self.optimizer, self.arguments)

    def step(self, batches: list[dict]) -> None:
        from primus_bridge.megatron.step import train_step
        from primus_bridge.objectives.supervised import supervised

        train_step(self.chunks, self.optimizer, self.scheduler, batches, supervised, self.parallel)

    def optimizer_bytes(self) -> int:
        """Of the moments that Adam will have of this rank's share, and of the master weights of bf16."""
        optimizers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        groups = [group for each in optimizers for group in each.optimizer.param_groups]
        numbers = sum(parameter.numel() for group in groups for parameter in group["params"])
        return numbers * (12 if self.arguments.mixed_precision == "bf16_mixed" else 8)

    def forget(self) -> None:
        from megatron.core import parallel_state

        del self.chunks, self.optimizer, self.scheduler
        parallel_state.destroy_global_memory_buffer()
        parallel_state._set_global_memory_buffer()


def micro_batches(arch: Architecture, arguments: BridgeArguments, document: int) -> list[dict]:
    """A rank's micro-batches of whole sequences, every position supervised; packed: documents of this length."""
    model, train = arguments.model, arguments.train
    rows, length = train.micro_batch_size, model.seq_length
    document = min(document, length)
    if arguments.dataset.packed_sequence:
        rows, length = 1, rows * length
    shape = (rows, length)
    generator = torch.Generator().manual_seed(0)
    layout = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    ranks = torch.distributed.get_world_size() // layout
    number = train.global_batch_size // (train.micro_batch_size * ranks)
    batch = {
        "tokens": torch.randint(0, arch.vocab_size, shape, generator=generator),
        "labels": torch.randint(0, arch.vocab_size, shape, generator=generator),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(length)[None].repeat(rows, 1),
    }
    if arguments.dataset.packed_sequence:
        batch["position_ids"] = torch.arange(length)[None] % document
        batch["cu_seqlens"] = torch.arange(0, length + 1, document, dtype=torch.int32)
    return [batch] * number


def kept_by_layer(runs: list[tuple[str, BridgeArguments]], rows: int) -> list[list[int]]:
    """Of each (model folder, arguments), on one rank: bytes that autograd keeps of each layer, parameters left out."""
    from primus_bridge.megatron.parallel import destroy_model_parallel, initialize

    parallel = initialize(runs[0][1])
    found = []
    for folder, arguments in runs:
        run = _Run(folder, arguments, parallel)
        run.build(to_train=False)
        found.append(_kept(run, rows, arguments.model.seq_length))
    destroy_model_parallel()
    return found


def _kept(run: _Run, rows: int, length: int) -> list[int]:
    [model] = run.chunks
    dtype = next(model.parameters()).dtype
    positions = torch.arange(length)[None].expand(rows, length)
    rotary = model.rotary_pos_emb(positions, length) if run.arch.rope else None
    # what is the same for all layers: masks and rotary positions are counted elsewhere, or are small
    shared = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    shared |= {rotary.untyped_storage().data_ptr()} if rotary is not None else set()
    found = []
    for layer in model.decoder.layers:
        kept: dict[int, int] = {}
        alive: list[torch.Tensor] = []  # a storage that is freed would give its address to another

        def keep(tensor, kept=kept, alive=alive):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared and tensor.shape != (length, length):
                kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        x = torch.randn(length, rows, run.arch.hidden_size, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x, rotary_pos_emb=rotary)
        found.append(sum(kept.values()))
    return found


def schedule_tables(shapes: list[tuple[int, int, int]]) -> list[tuple[list[tuple[int, int]], list[int]]]:
    """Of each (stages, virtual stages, micro-batches): Megatron's order of (micro-batch, chunk), and each stage's
    forward passes before the first backward pass."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    from primus_bridge.patching import apply_patches

    apply_patches(device="cpu")
    found = []
    for stages, virtual, micro_batches in shapes:
        warmups = []
        for stage in range(stages):
            parallel_state.set_pipeline_model_parallel_world_size(stages)
            parallel_state.set_pipeline_model_parallel_rank(stage)
            parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
            warmups.append(schedules.get_pp_rank_microbatches(micro_batches, virtual, stages)[2])
        found.append((schedules.get_schedule_table(micro_batches, virtual, stages), warmups))
    return found


def step_flops(folder: str, arguments: BridgeArguments) -> int:
    """What torch counts of matrix products in a forward and a backward pass of one sequence, all of it supervised."""
    from torch.utils.flop_counter import FlopCounterMode

    from primus_bridge.megatron.parallel import destroy_model_parallel, initialize

    run = _Run(folder, arguments, initialize(arguments))
    run.build()
    counter = FlopCounterMode(display=False)
    with counter:
        run.step(micro_batches(run.arch, arguments, 8))
    run.forget()
    destroy_model_parallel()
    return counter.get_total_flops()


def constants() -> dict[str, int]:
    """Sizes at which the code of the model changes its ways, which a plan may not import."""
    from primus_bridge.patching import apply_patches

    apply_patches(device="cpu")
    from primus_bridge.megatron import core_attention, cross_entropy

    names = {core_attention: ("FP32_KEYS", "QUERY_BLOCK"), cross_entropy: ("KEEP_BYTES", "CHUNK_BYTES")}
    return {name: getattr(module, name) for module, of in names.items() for name in of}


def phases(folder: str, runs: list[BridgeArguments]) -> list:
    """Of each arguments: what MemoryWatch measures in two steps."""
    from primus_bridge.megatron.memory import MemoryWatch
    from primus_bridge.megatron.parallel import destroy_model_parallel, initialize

    found = []
    for arguments in runs:
        run = _Run(folder, arguments, initialize(arguments))
        run.build()
        watch = MemoryWatch(run.chunks, run.optimizer)
        batches = micro_batches(run.arch, arguments, 1)
        for _ in range(2):
            watch.begin_step(batches)
            run.step(batches)
            watch.end_step()
        found.append(watch.phases())
        run.forget()
        destroy_model_parallel()
    return found
