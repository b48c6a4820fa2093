"""LoRA on Megatron's tensor-parallel linears: frozen base, low-rank adapters, one a projection or one a fused linear.

Names are Megatron-Bridge's: the base lies under ``to_wrap``, adapters under ``adapter``. The communication of an
adapter is over its rank-wide activations only. Source: Hu et al. 2021; scaling alpha / dim.
"""

from __future__ import annotations

import hashlib
import math
from typing import Optional, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from primus_bridge.config.arguments import PeftArguments
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.peft.targets import adapted_parts


class _Weight(torch.nn.Module):
    """A bias-free linear's weight [out, in], marked for Megatron's gradient norm and reductions."""

    def __init__(self, rows: int, columns: int, like: torch.Tensor, split: Optional[int], partial_gradient: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=like.dtype, device=like.device))
        self.split = split
        if split is not None:
            tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, split, 1)
        # under sequence parallelism a whole weight sees only this rank's tokens: Megatron sums such gradients
        self.weight.sequence_parallel = partial_gradient and split is None  # type: ignore[attr-defined]


class Adapter(torch.nn.Module):
    """The two weights beside a column-parallel or a row-parallel linear, for the whole of it or for one projection.

    Column: linear_in [rank, in] is whole on every tensor-parallel rank, linear_out [out / tp, rank] is split.
    Row: linear_in [rank, in / tp] is split, linear_out [out, rank] is whole. Checkpoints hold whole tensors either way.
    """

    def __init__(self, rows: int, columns: int, base, rank: int, row_parallel: bool):
        super().__init__()
        like, sequence = base.weight, base.config.sequence_parallel
        self.row_parallel = row_parallel
        self.linear_in = _Weight(rank, columns, like, split=1 if row_parallel else None, partial_gradient=sequence)
        self.linear_out = _Weight(rows, rank, like, split=None if row_parallel else 0, partial_gradient=sequence)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        # the parameters themselves: the optimizer finds its state by their identity
        weights = {"linear_in.weight": self.linear_in.weight, "linear_out.weight": self.linear_out.weight}
        axes = {
            f"{name}.weight": weight.split
            for name, weight in (("linear_in", self.linear_in), ("linear_out", self.linear_out))
            if weight.split is not None
        }
        return make_sharded_tensors_for_checkpoint(weights, prefix, axes, sharded_offsets)


class LoRALinear(torch.nn.Module):
    """A frozen Megatron linear and its adapters.

    All adapters of a linear work as one: their linear_in stacked, their linear_out block by block in the row order of
    the base weight, so that x is read once and the output is written once. They share one dropout mask.
    """

    def __init__(self, base, name: str, parts: tuple[str, ...], lora: PeftArguments, arch: Architecture, tp: int):
        super().__init__()
        self.to_wrap = base
        self.config = base.config
        self.name, self.parts = name, parts
        self.rank, self.scale, self.dropout = lora.dim, lora.alpha / lora.dim, lora.dropout
        self.groups = arch.num_query_groups // tp
        self.row_parallel = name in ("linear_proj", "linear_fc2")
        rows, columns = base.weight.shape
        self.sizes = {
            "q": arch.q_size // tp,
            "k": arch.kv_size // tp,
            "v": arch.kv_size // tp,
            "gate": arch.ffn_hidden_size // tp,
            "up": arch.ffn_hidden_size // tp,
        }
        built = {
            part: Adapter(self.sizes.get(part, rows), columns, base, lora.dim, self.row_parallel) for part in parts
        }
        # an adapter over the whole linear lies at ``adapter``, those of its projections under ``adapter.adapter_q`` ...
        whole = parts[0] not in self.sizes
        self.adapter: torch.nn.Module = (
            built[parts[0]] if whole else torch.nn.ModuleDict({f"adapter_{p}": a for p, a in built.items()})
        )

    def adapters(self) -> dict[str, Adapter]:
        """part -> adapter."""
        if isinstance(self.adapter, Adapter):
            return {self.parts[0]: self.adapter}
        return {part: cast(Adapter, self.adapter.get_submodule(f"adapter_{part}")) for part in self.parts}

    def forward(self, x: torch.Tensor, *args, **kwargs):
        """As the base linear: x [s, b, in] -> ([s, b, out], bias or None)."""
        output, bias = self.to_wrap(x, *args, **kwargs)
        low = self._low(F.linear(self._dropped(x), self._stacked_in()))
        rows = output.shape[-1]
        # one product that adds to the base's output
        added = torch.addmm(
            output.view(-1, rows), low.view(-1, low.shape[-1]), self._stacked_out().t(), alpha=self.scale
        )
        return added.view(output.shape), bias

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        if self.row_parallel or self.config.sequence_parallel:
            # each tensor-parallel rank has its own part of x and draws its own mask
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)

    def _low(self, low: torch.Tensor) -> torch.Tensor:
        """Communication over the ranks, of rank-wide activations only."""
        sequence = self.config.sequence_parallel
        if self.row_parallel:
            if sequence:
                return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        # backward sums over the ranks what their parts of linear_out give
        if sequence:
            return tensor_parallel.gather_from_sequence_parallel_region(low)
        return tensor_parallel.copy_to_tensor_model_parallel_region(low)

    def _stacked_in(self) -> torch.Tensor:
        weights: list[torch.Tensor] = [adapter.linear_in.weight for adapter in self.adapters().values()]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def _stacked_out(self) -> torch.Tensor:
        """[rows of the base weight, rank x adapters]: each adapter's block, zeros where a projection has none."""
        if isinstance(self.adapter, Adapter):
            return self.adapter.linear_out.weight
        adapters, width = self.adapters(), self.rank * len(self.parts)
        blocks = []
        for part in ("q", "k", "v") if self.name == "linear_qkv" else ("gate", "up"):
            if part in adapters:
                left = self.rank * self.parts.index(part)
                block = F.pad(adapters[part].linear_out.weight, (left, width - left - self.rank))
            else:
                block = self.to_wrap.weight.new_zeros(self.sizes[part], width)
            # q, k and v of a group lie together; gate and up one after the other
            blocks.append(block.unflatten(0, (self.groups, -1)) if self.name == "linear_qkv" else block)
        if self.name == "linear_qkv":
            return torch.cat(blocks, dim=1).flatten(0, 1)
        return torch.cat(blocks)

    def merged_weight(self) -> torch.Tensor:
        """This rank's base weight with its adapters added, computed in fp32."""
        base = self.to_wrap.weight.detach()
        delta = self._stacked_out().detach().float() @ self._stacked_in().detach().float()
        return (base.float() + self.scale * delta).to(base.dtype)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The adapters only: checkpoints of a LoRA run hold nothing of the base."""
        state = {}
        for part, adapter in self.adapters().items():
            where = f"{prefix}adapter." if isinstance(self.adapter, Adapter) else f"{prefix}adapter.adapter_{part}."
            own = adapter.sharded_state_dict(where, sharded_offsets, metadata)
            if part == "fused" and self.name == "linear_fc1":
                name = f"{where}linear_out.weight"
                own[name] = apply_swiglu_sharded_factory(own[name], sharded_offsets)
            state.update(own)
        return state


class LoRA:
    """The adapters of a model's chunks on this rank."""

    def __init__(self, arguments: PeftArguments, trainable: int, total: int):
        self.arguments = arguments
        self.trainable, self.total = trainable, total

    def describe(self) -> str:
        """``LoRA rank 16, alpha 32 on q_proj, v_proj (1,234 trainable parameters, 0.5 %)``; of this rank's part."""
        lora = self.arguments
        return (
            f"LoRA rank {lora.dim}, alpha {lora.alpha:g} on {', '.join(lora.target_modules)} "
            f"({self.trainable:,} trainable parameters a rank, {100 * self.trainable / self.total:.2f} %)"
        )


def add_lora(chunks: list, arguments: PeftArguments, arch: Architecture, seed: int) -> LoRA:
    """Freeze every weight of the chunks and put adapters on the target linears.

    linear_in starts uniform in +-1/sqrt(in) (as PEFT), seeded by (seed, name) so that every layout starts alike;
    linear_out starts at zero. Call it after the base weights are loaded.
    """
    from primus_bridge.megatron.names import global_name

    parts = adapted_parts(arguments.target_modules)
    for chunk in chunks:
        chunk.requires_grad_(False)
        tp, rank = chunk.pg_collection.tp.size(), chunk.pg_collection.tp.rank()
        for layer in chunk.decoder.layers:
            for owner in (layer.self_attention, layer.mlp):
                for name in parts:
                    if hasattr(owner, name):
                        base = getattr(owner, name)
                        setattr(owner, name, LoRALinear(base, name, parts[name], arguments, arch, tp))
        for name, parameter in chunk.named_parameters():
            if name.endswith("linear_in.weight"):
                _initialise(parameter, f"{seed}:{global_name(name, chunk)}", rank, tp)
        if chunk.config.recompute_granularity == "full" and chunk.pre_process:
            # a recomputed block whose input needs no gradient would give its adapters none
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return LoRA(arguments, trainable, sum(p.numel() for p in parameters))


@torch.no_grad()
def _initialise(parameter: torch.nn.Parameter, name: str, rank: int, tp: int) -> None:
    split = getattr(parameter, "tensor_model_parallel", False)
    rows, columns = parameter.shape
    whole = columns * tp if split else columns
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))
    bound = 1 / math.sqrt(whole)
    values = torch.empty(rows, whole).uniform_(-bound, bound, generator=generator)
    parameter.copy_(values[:, rank * columns : (rank + 1) * columns] if split else values)
