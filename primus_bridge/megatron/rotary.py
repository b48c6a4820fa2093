"""Rotary position embedding: the full rope parameters of a Hugging Face config, and their application.

megatron.core 0.16 takes only a scaling factor; inverse frequencies are computed here from all parameters, as
transformers.modeling_rope_utils defines them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from primus_bridge.conversion.architecture import Rope, yarn_mscale


def inverse_frequencies(rope: Rope, seq_len: int = 0) -> tuple[torch.Tensor, float]:
    """(inv_freq fp32 [dim / 2], the factor that scales cos and sin) for sequences of ``seq_len`` tokens.

    The length matters to dynamic and longrope only, which stretch with it.
    Sources: Su et al. 2021; dynamic NTK, 2023; Llama 3.1's rule; Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE).
    """
    scaling, dim, base = rope.scaling, rope.dim, rope.base
    kind = scaling["rope_type"] if scaling else "default"
    if scaling and kind == "dynamic":
        longer = max(seq_len, rope.max_positions) / rope.max_positions
        base *= (scaling["factor"] * longer - (scaling["factor"] - 1)) ** (dim / (dim - 2))
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if not scaling or kind == "dynamic":
        return inv_freq, 1.0
    if kind == "linear":
        return inv_freq / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    if kind == "longrope":
        return _longrope(rope, scaling, seq_len)
    assert kind == "yarn", kind
    return _yarn(dim, base, scaling)


def _longrope(rope: Rope, scaling: dict, seq_len: int) -> tuple[torch.Tensor, float]:
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or rope.max_positions / original
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    stretch = scaling["long_factor"] if seq_len > original else scaling["short_factor"]
    powers = rope.base ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim)
    return 1.0 / (torch.tensor(stretch, dtype=torch.float32) * powers), attention


def _llama3(inv_freq: torch.Tensor, scaling: dict) -> torch.Tensor:
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < original / high) * ~(wavelength > original / low)
    return torch.where(medium, smoothed, scaled)


def _yarn(dim: int, base: float, scaling: dict) -> tuple[torch.Tensor, float]:
    factor = scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    attention = scaling.get("attention_factor")

    if attention is None:
        attention = yarn_mscale(factor)
        if mscale and mscale_all_dim:
            attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)

    def correction_dim(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = correction_dim(scaling.get("beta_fast") or 32)
    high = correction_dim(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as the reference: no division by zero
    pos_freqs = base ** (torch.arange(0, dim, 2).float() / dim)
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    extrapolation = 1 - ramp
    return (1.0 / (factor * pos_freqs)) * (1 - extrapolation) + (1.0 / pos_freqs) * extrapolation, attention


class RotaryEmbedding(torch.nn.Module):
    """cos and sin of positions, stacked [2 x ropes, s, dim / 2] in fp32; stands in GPTModel.rotary_pos_emb.

    seq_length: the longest sequence that the run may have, by which dynamic and longrope stretch, as vLLM does by its
    longest: transformers goes by the batch, so that a sample's positions would depend on its neighbours.

    One tensor, because Megatron's recompute passes it through checkpoint() as one argument; a layer takes the two
    planes of its rope (layer_cos_sin).
    """

    def __init__(self, ropes: Sequence[Rope], seq_length: int):
        super().__init__()
        self.ropes, self.seq_length = ropes, seq_length
        self._cos_sin: torch.Tensor | None = None  # of the longest sequence so far

    def forward(self, position_ids: torch.Tensor, longest: int) -> torch.Tensor:
        """[2 x ropes, s, dim / 2] of position_ids [b, s], whose rows are alike. longest: more than any position."""
        cached = self._cos_sin
        if cached is None or cached.shape[1] < longest:
            planes = []
            for rope in self.ropes:
                inv_freq, factor = inverse_frequencies(rope, self.seq_length)
                angles = torch.outer(torch.arange(longest, dtype=torch.float32), inv_freq)
                planes += [angles.cos() * factor, angles.sin() * factor]
            self._cos_sin = cached = torch.stack(planes).to(position_ids.device)
        return cached.index_select(1, position_ids[0])


def layer_cos_sin(cos_sin: torch.Tensor | None, rope: int) -> torch.Tensor | None:
    """[2, s, dim / 2] of the layer's rope, the ``rope``-th of RotaryEmbedding."""
    return None if cos_sin is None else cos_sin[2 * rope : 2 * rope + 2]


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """out = x rotated; halves (or neighbours) of the last dimension form the pairs.

    cos, sin: [..., dim / 2], broadcastable; dimensions of x past ``dim`` are copied. With -sin it is the inverse,
    which is also the gradient.
    """
    dim = 2 * cos.shape[-1]
    if dim < x.shape[-1]:
        out[..., dim:] = x[..., dim:]
        x, out_dim = x[..., :dim], out[..., :dim]
    else:
        out_dim = out
    first, second = _pairs(x, interleaved)
    out_first, out_second = _pairs(out_dim, interleaved)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def cos_and_sin(cos_sin: torch.Tensor, like: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [s, 1, ..., dim / 2] in like's dtype, from cos_sin [2, s, dim / 2]; ``dims`` of them."""
    _, s, half = cos_sin.shape
    shaped = cos_sin.to(like.dtype).view(2, s, *[1] * (dims - 2), half)
    return shaped[0], shaped[1]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos_sin, interleaved):
        ctx.save_for_backward(cos_sin)
        ctx.interleaved = interleaved
        return rotate(x, *cos_and_sin(cos_sin, x, x.dim()), out=torch.empty_like(x), interleaved=interleaved)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = cos_and_sin(ctx.saved_tensors[0], grad, grad.dim())
        return rotate(grad, cos, -sin, out=torch.empty_like(grad), interleaved=ctx.interleaved), None, None


def apply_rotary(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate x [s, b, heads, d] by cos_sin [2, s, dim / 2]."""
    return _Rotary.apply(x, cos_sin, interleaved)
