"""One forward and backward pass of a model at a layout, every stage's output shown to a watcher as it is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.load import load_weights
from primus_bridge.conversion.rules import TensorReader
from primus_bridge.megatron.model import GPTModel, build_model
from primus_bridge.megatron.names import global_parameters
from primus_bridge.megatron.optimizer import wrap_data_parallel
from primus_bridge.megatron.parallel import Parallel, device
from primus_bridge.megatron.step import Batch, run_schedule
from primus_bridge.objectives.supervised import supervised


@dataclass(frozen=True)
class Part:
    """A rank's part of a stage's output, fp32 on the CPU [b, s, n], and where it lies in the whole batch's."""

    values: torch.Tensor
    rows: slice
    positions: slice
    columns: slice


Watcher = Callable[[str, Part], None]
"""Gets the stage ("embedding", "layer 3", "layer 3 attention", "layer 3 mlp", "final norm", "logits") and its part."""


@dataclass(frozen=True)
class Traced:
    """loss: mean over the supervised tokens of the whole batch. weights, gradients: this rank's, by global names."""

    loss: float
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def trace(
    family: Family,
    arch: Architecture,
    reader: TensorReader,
    arguments: BridgeArguments,
    parallel: Parallel,
    batch: Batch,
    watch: Watcher,
) -> Traced:
    """Build the model with the weights of ``reader`` and pass ``batch`` (of all data-parallel ranks) through it.

    Without the distributed optimizer (arguments.ddp), so that each rank has the whole gradients of its parameters.
    Collective.
    """
    assert not arguments.ddp.use_distributed_optimizer
    chunks = build_model(arch, arguments, parallel)
    load_weights(global_parameters(chunks), reader, family, arch, parallel.shards)
    wrapped = wrap_data_parallel(chunks, arguments)
    count = arguments.train.micro_batch_size
    rows = slice(parallel.dp_rank * count, (parallel.dp_rank + 1) * count)
    own = {name: tensor[rows] for name, tensor in batch.items()}
    handles = [handle for chunk in chunks for handle in _watch_layers(chunk, parallel, rows, watch)]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    total, tokens = run_schedule(wrapped, [own], supervised, parallel, forward_only=False)["loss"]
    for handle in handles:
        handle.remove()
    _watch_logits(chunks, own, parallel, rows, watch)
    weights = global_parameters(chunks)
    gradients = {name: weight.main_grad for name, weight in weights.items() if hasattr(weight, "main_grad")}
    return Traced(total / tokens, weights, gradients)


def _watch_layers(chunk: GPTModel, parallel: Parallel, rows: slice, watch: Watcher) -> list[Any]:
    """Hooks on this chunk's layers; a hidden state is [s, b, h], under sequence parallelism a part of s."""

    def show(name: str, hidden: torch.Tensor) -> None:
        own = hidden.shape[0]
        start = parallel.tp_rank * own if chunk.config.sequence_parallel else 0
        values = hidden.detach().transpose(0, 1).float().cpu()
        watch(name, Part(values, rows, slice(start, start + own), slice(0, values.shape[2])))

    def layer_hook(name: str):
        return lambda _module, _inputs, output: show(name, output[0])

    def branch_hook(name: str):
        def hook(_module, _inputs, output) -> None:
            values, bias = output
            show(name, values if bias is None else values + bias)

        return hook

    def first_input(_module, inputs, keywords) -> None:
        show("embedding", keywords["hidden_states"] if "hidden_states" in keywords else inputs[0])

    handles: list[Any] = []
    for layer in chunk.decoder.layers:
        number = layer.layer_number - 1
        if number == 0:
            handles.append(layer.register_forward_pre_hook(first_input, with_kwargs=True))
        handles.append(layer.register_forward_hook(layer_hook(f"layer {number}")))
        handles.append(layer.self_attention.register_forward_hook(branch_hook(f"layer {number} attention")))
        handles.append(layer.mlp.register_forward_hook(branch_hook(f"layer {number} mlp")))
    norm = getattr(chunk.decoder, "final_layernorm", None)
    if norm is not None:
        handles.append(norm.register_forward_hook(lambda _module, _inputs, output: show("final norm", output)))
    return handles


@torch.no_grad()
def _watch_logits(chunks: list[GPTModel], batch: Batch, parallel: Parallel, rows: slice, watch: Watcher) -> None:
    """A forward pass without labels: what comes out is then the logits of this rank's part of the vocabulary."""
    moved = {name: tensor.to(device()) for name, tensor in batch.items()}
    chunk = chunks[-1]

    def show(local: torch.Tensor, non_loss_data: bool = True) -> None:
        start = parallel.tp_rank * local.shape[-1]
        stop = min(start + local.shape[-1], chunk.arch.vocab_size)
        if start < stop:
            values = chunk.scaled_logits(local[..., : stop - start]).cpu()
            watch("logits", Part(values, rows, slice(0, values.shape[1]), slice(start, stop)))

    count, length = moved["tokens"].shape
    iterators = [iter([moved]) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=partial(_logits_step, show),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=count,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _logits_step(show, batches, model) -> tuple[torch.Tensor, Callable]:
    batch = next(batches)
    return model(batch["tokens"], batch["position_ids"], None), show
