"""LoRA, rsLoRA and DoRA on Megatron's tensor-parallel linears: frozen base, low-rank adapters beside it.

Names are Megatron-Bridge's: the base lies under ``to_wrap``, adapters under ``adapter``. The communication of an
adapter is over its rank-wide activations only. Source: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

from typing import Optional, Sequence, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.rules import FusedQKV, GatedMLP, Shard, qkv_views
from primus_bridge.megatron.rng import own_numbers
from primus_bridge.peft.plan import AdapterPlan, AdapterSpec
from primus_bridge.peft.targets import WHOLE

ROWS = 1024
"""Rows of a weight that are computed with at a time, in fp32."""


class _Weight(torch.nn.Module):
    """A bias-free linear's weight [out, in], marked for Megatron's gradient norm and reductions."""

    def __init__(self, rows: int, columns: int, like: torch.Tensor, split: Optional[int], partial_gradient: bool):
        super().__init__()
        self.weight = _parameter((rows, columns), like, split, partial_gradient)
        self.split = split


def _parameter(shape, like: torch.Tensor, split: Optional[int], partial_gradient: bool) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
    if split is not None:
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, split, 1)
    # under sequence parallelism a whole weight sees only this rank's tokens: Megatron sums such gradients
    parameter.sequence_parallel = partial_gradient and split is None  # type: ignore[attr-defined]
    return parameter


class Adapter(torch.nn.Module):
    """The weights beside a linear, for the whole of it or for one of its projections.

    linear_in [rank, in] and linear_out [out, rank] are split as the linear is: by its outputs (linear_out), by its
    inputs (linear_in), or not at all. weight_magnitude [out] is DoRA's, a length for each row of the weight.
    Checkpoints hold whole tensors either way.
    """

    def __init__(self, spec: AdapterSpec, rows: int, base, whole_rows: bool, dora: bool):
        super().__init__()
        split, like, sequence = spec.linear.split, base.weight, base.config.sequence_parallel
        self.rank = spec.rank
        self.out_split = 0 if split == 0 and not whole_rows else None
        # whole rows of a linear that is split by outputs see all tokens
        partial = sequence and not whole_rows
        in_split = 1 if split == 1 else None
        self.linear_in = _Weight(spec.rank, base.weight.shape[1], like, in_split, partial_gradient=sequence)
        self.linear_out = _Weight(rows, spec.rank, like, self.out_split, partial_gradient=partial)
        if dora:
            self.weight_magnitude = _parameter((rows,), like, self.out_split, partial)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        # the parameters themselves: the optimizer finds its state by their identity
        splits = {"linear_in.weight": self.linear_in.split, "linear_out.weight": self.out_split}
        if hasattr(self, "weight_magnitude"):
            splits["weight_magnitude"] = self.out_split
        weights = {name: self.get_parameter(name) for name in splits}
        axes = {name: split for name, split in splits.items() if split is not None}
        return make_sharded_tensors_for_checkpoint(weights, prefix, axes, sharded_offsets)


class LoRALinear(torch.nn.Module):
    """A frozen Megatron linear and its adapters.

    All adapters of a linear work as one: their linear_in stacked, their linear_out block by block in the row order of
    the base weight, so that x is read once and the output is written once. They share one dropout mask.
    """

    def __init__(self, base, specs: Sequence[AdapterSpec], plan: AdapterPlan, dropout: float, tp):
        super().__init__()
        self.to_wrap = base
        self.config = base.config
        self.tp, self.dropout, self.dora = tp, dropout, plan.use_dora
        self.linear, self.layer = specs[0].linear, specs[0].layer
        self.arch: Architecture = plan.arch
        self.alike = plan.alike(self.linear)
        self.parts = tuple(spec.part for spec in specs)
        scales = {plan.scaling(spec) for spec in specs}
        # one scale is a factor of the product; several scale their blocks
        self.scale = scales.pop() if len(scales) == 1 else 1.0
        self.scales = {spec.part: plan.scaling(spec) / self.scale for spec in specs}
        # ranks that share a group of q, k and v each hold some of its rows: adapters of q, k, v are whole there
        self.shares_groups = isinstance(self.linear.rule, FusedQKV) and self.arch.num_query_groups % tp.size() != 0
        built = {spec.part: self._adapter(spec, base) for spec in specs}
        # an adapter over the whole linear lies at ``adapter``, those of its projections under ``adapter.adapter_q`` ...
        self.adapter: torch.nn.Module = (
            built[WHOLE] if WHOLE in built else torch.nn.ModuleDict({f"adapter_{p}": a for p, a in built.items()})
        )
        self._squares: Optional[torch.Tensor] = None

    def _adapter(self, spec: AdapterSpec, base) -> Adapter:
        if spec.part == WHOLE:
            return Adapter(spec, base.weight.shape[0], base, False, self.dora)
        rows = self.linear.size(spec.part, self.arch)
        rows = rows if self.shares_groups else rows // self.tp.size()
        return Adapter(spec, rows, base, self.shares_groups, self.dora)

    def adapters(self) -> dict[str, Adapter]:
        """part -> adapter."""
        if isinstance(self.adapter, Adapter):
            return {WHOLE: self.adapter}
        return {part: cast(Adapter, self.adapter.get_submodule(f"adapter_{part}")) for part in self.parts}

    def forward(self, x: torch.Tensor, *args, **kwargs):
        """As the base linear: x [s, b, in] -> ([s, b, out], bias or None)."""
        output, bias = self.to_wrap(x, *args, **kwargs)
        dropped = self._dropped(x)
        low = self._low(F.linear(dropped, self._stacked_in()))
        if not self.dora:
            return self._plus(output, low), bias
        total, own = self._plus(output, low), self._own_bias()
        if dropped is x:
            bare = total if own is None else total - own
        else:
            # as peft: the change of length is that of the dropped input too
            plain = self.to_wrap(dropped, *args, **kwargs)[0]
            bare = self._plus(plain if own is None else plain - own, low)
        # the change, not the factor: near 1 a bf16 has two digits
        return torch.addcmul(total, bare, (self._row_scale() - 1).to(total.dtype)), bias

    def _own_bias(self) -> Optional[torch.Tensor]:
        """The bias that the base adds by itself."""
        return None if getattr(self.to_wrap, "skip_bias_add", True) else self.to_wrap.bias

    def _plus(self, output: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """output + scale * low @ linear_out^T in one product."""
        rows = output.shape[-1]
        added = torch.addmm(
            output.view(-1, rows), low.view(-1, low.shape[-1]), self._stacked_out().t(), alpha=self.scale
        )
        return added.view(output.shape)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        if self.linear.split == 1 or self.config.sequence_parallel:
            # each tensor-parallel rank has its own part of x and draws its own mask
            with own_numbers(self.config):
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)

    def _low(self, low: torch.Tensor) -> torch.Tensor:
        """Communication over the ranks, of rank-wide activations only."""
        if self.linear.split is None:
            return low
        sequence = self.config.sequence_parallel
        if self.linear.split == 1:
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
        """[rows of the base weight, ranks of all adapters]: each one's block, zeros where a projection has none."""
        if isinstance(self.adapter, Adapter):
            return self.adapter.linear_out.weight
        adapters, left, blocks = self.adapters(), 0, {}
        width = sum(adapter.rank for adapter in adapters.values())
        for part, adapter in adapters.items():
            weight: torch.Tensor = adapter.linear_out.weight
            scaled = weight if self.scales[part] == 1.0 else weight * self.scales[part]
            blocks[part] = F.pad(scaled, (left, width - left - adapter.rank))
            left += adapter.rank
        return self._in_row_order(blocks)

    def _in_row_order(self, blocks: dict[str, torch.Tensor], missing: float = 0.0) -> torch.Tensor:
        """Rows of the projections in the order of the base weight's; ``missing`` where a projection has none."""
        like = next(iter(blocks.values()))
        if isinstance(self.linear.rule, GatedMLP):
            rows = self.to_wrap.weight.shape[0] // 2
            return torch.cat([_or_filled(blocks.get(part), like, rows, missing) for part in ("gate", "up")])
        if self.shares_groups:
            parts = []
            for part, (view, rows) in zip("qkv", self._qkv_views(self.to_wrap.weight), strict=True):
                if part in blocks:
                    # all ranks have the same block and use other rows of it: backward sums what they give
                    parts.append(tensor_parallel.copy_to_tensor_model_parallel_region(blocks[part])[rows])
                else:
                    parts.append(_or_filled(None, like, len(view), missing))
            return torch.cat(parts)
        groups = self.arch.num_query_groups // self.tp.size()
        sizes = {part: self.linear.size(part, self.arch) // self.tp.size() for part in "qkv"}
        # q, k and v of a group lie together
        filled = [_or_filled(blocks.get(part), like, sizes[part], missing) for part in "qkv"]
        return torch.cat([block.unflatten(0, (groups, -1)) for block in filled], dim=1).flatten(0, 1)

    def _qkv_views(self, rows: torch.Tensor):
        return qkv_views(rows, self.arch, Shard(self.tp.rank(), self.tp.size()))

    def _row_scale(self) -> torch.Tensor:
        """DoRA's factor of each output, fp32 [rows]: magnitude / length of the row of base plus adapters.

        The length is a constant to the gradient (section 4.3 of the paper, and peft).
        """
        lengths = self._row_lengths()
        if isinstance(self.adapter, Adapter):
            return self.adapter.weight_magnitude.float() / lengths
        magnitudes = {part: adapter.weight_magnitude.float() for part, adapter in self.adapters().items()}
        scale = self._in_row_order(magnitudes) / lengths
        absent = self._in_row_order({part: torch.zeros_like(m) for part, m in magnitudes.items()}, missing=1.0)
        return scale + absent

    @torch.no_grad()
    def _row_lengths(self) -> torch.Tensor:
        """Lengths of the rows of base + scale * linear_out @ linear_in, fp32 [rows], without making their sum."""
        base, a = self.to_wrap.weight, self._stacked_in()
        b = self.scale * self._stacked_out().float()
        if self._squares is None:
            # the base is frozen; by rows, for an fp32 copy of the whole weight may be too much
            self._squares = torch.cat([part.float().square().sum(1) for part in base.split(ROWS)])
        cross = (base @ a.t()).float()
        a = a.float()
        squares = self._squares + 2 * (cross * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
        if self.linear.split == 1:
            dist.all_reduce(squares, group=self.tp)
        return squares.clamp_min_(0).sqrt_()

    @torch.no_grad()
    def start_magnitudes(self) -> None:
        """DoRA starts with the lengths that the rows have. Collective over the tensor-parallel ranks."""
        lengths = self._row_lengths()
        if isinstance(self.adapter, Adapter):
            self.adapter.weight_magnitude.copy_(lengths)
            return
        names = ("gate", "up") if isinstance(self.linear.rule, GatedMLP) else "qkv"
        if names == "qkv":
            views = list(self._qkv_views(lengths))
        else:
            views = [(half, slice(0, len(half))) for half in lengths.chunk(2)]
        for part, (view, rows) in zip(names, views, strict=True):
            if part not in self.parts:
                continue
            magnitude = self.adapters()[part].weight_magnitude
            if self.shares_groups:
                whole = torch.zeros_like(magnitude, dtype=torch.float32)
                whole[rows] = view
                dist.all_reduce(whole, group=self.tp)
                magnitude.copy_(whole)
            else:
                magnitude.copy_(view.flatten())

    def merged_weight(self, row_scale: Optional[torch.Tensor] = None) -> torch.Tensor:
        """This rank's base weight with its adapters added, computed in fp32. row_scale: DoRA's, from ``_row_scale``."""
        base = self.to_wrap.weight.detach()
        out, inner = self._stacked_out().detach().float(), self._stacked_in().detach().float()
        merged = torch.empty_like(base)
        for first in range(0, len(base), ROWS):
            rows = slice(first, first + ROWS)
            block = base[rows].float() + self.scale * (out[rows] @ inner)
            merged[rows] = block if row_scale is None else block.mul_(row_scale[rows, None])
        return merged

    @torch.no_grad()
    def row_scale(self) -> Optional[torch.Tensor]:
        """What ``merged_weight`` needs for DoRA. Collective over the tensor-parallel ranks."""
        return self._row_scale() if self.dora else None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The adapters only: checkpoints of a LoRA run hold nothing of the base.

        Layers are stacked as Megatron stacks them; where not all have the same adapters, each has keys of its own.
        """
        state = {}
        offsets = sharded_offsets if self.alike else ()
        for part, adapter in self.adapters().items():
            where = f"{prefix}adapter." if isinstance(self.adapter, Adapter) else f"{prefix}adapter.adapter_{part}."
            own = adapter.sharded_state_dict(where, offsets, metadata)
            for name, tensor in own.items():
                if not self.alike:
                    tensor.key = f"{where}layer_{self.layer}.{name.removeprefix(where)}"
                if part == WHOLE and isinstance(self.linear.rule, GatedMLP) and "linear_in" not in name:
                    tensor = apply_swiglu_sharded_factory(tensor, offsets)
                state[name] = tensor
        return state


def _or_filled(block: Optional[torch.Tensor], like: torch.Tensor, rows: int, value: float) -> torch.Tensor:
    return like.new_full((rows, *like.shape[1:]), value) if block is None else block
