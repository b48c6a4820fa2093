"""Rotary position embedding: the full rope parameters of a Hugging Face config, and their application.

megatron.core 0.16 takes only a scaling factor; inverse frequencies are computed here from all parameters, as
transformers.modeling_rope_utils defines them.
"""

from __future__ import annotations

import math

import torch


def inverse_frequencies(head_dim: int, base: float, scaling: dict | None) -> tuple[torch.Tensor, float]:
    """(inv_freq fp32 [head_dim/2], the factor that scales cos and sin).

    scaling: of a kind that conversion/families/common.py lets through.
    Sources: Su et al. 2021; Llama 3.1's llama3 rule; Peng et al. 2023 (YaRN).
    """
    inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if not scaling:
        return inv_freq, 1.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return inv_freq, 1.0
    if kind == "linear":
        return inv_freq / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    assert kind == "yarn", kind
    return _yarn(head_dim, base, scaling)


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

    def get_mscale(scale, m=1):
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    if attention is None:
        both = mscale and mscale_all_dim
        attention = get_mscale(factor, mscale) / get_mscale(factor, mscale_all_dim) if both else get_mscale(factor)

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
    """cos and sin for positions 0..s-1, stacked [2, s, head_dim] in fp32; stands in GPTModel.rotary_pos_emb.

    One tensor, because Megatron's recompute passes it through checkpoint() as one argument.
    """

    def __init__(self, head_dim: int, base: float, scaling: dict | None):
        super().__init__()
        self._cos_sin: torch.Tensor | None = None  # of the longest sequence so far
        self.inv_freq, self.attention_factor = inverse_frequencies(head_dim, base, scaling)

    def get_rotary_seq_len(self, inference_context, transformer, transformer_input, config, packed_seq_params=None):
        """Length of the whole sequence as this stage sees it (its hidden states may be a sequence-parallel part)."""
        hidden = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        return hidden.shape[0] * (config.tensor_model_parallel_size if config.sequence_parallel else 1)

    def forward(self, seq_len: int, packed_seq: bool = False, cp_group=None) -> torch.Tensor:
        if self._cos_sin is None or self._cos_sin.shape[1] < seq_len:
            from primus_bridge.megatron.parallel import device

            angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), self.inv_freq)
            angles = torch.cat((angles, angles), dim=-1)
            self._cos_sin = (torch.stack((angles.cos(), angles.sin())) * self.attention_factor).to(device())
        return self._cos_sin[:, :seq_len]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = x rotated; the two halves of the last dimension form the pairs. cos, sin: its first half, broadcastable.

    With -sin it is the inverse, which is also the gradient.
    """
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def half_cos_sin(cos_sin: torch.Tensor, like: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [s, 1, ..., d/2] in like's dtype, from cos_sin [2, s, d]; ``dims`` of them."""
    s, d = cos_sin.shape[1:]
    half = cos_sin[:, :, : d // 2].to(like.dtype).view(2, s, *[1] * (dims - 2), d // 2)
    return half[0], half[1]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos_sin):
        ctx.save_for_backward(cos_sin)
        return rotate(x, *half_cos_sin(cos_sin, x, x.dim()), out=torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad):
        cos, sin = half_cos_sin(ctx.saved_tensors[0], grad, grad.dim())
        return rotate(grad, cos, -sin, out=torch.empty_like(grad)), None


def apply_rotary(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [s, b, heads, d] by cos_sin [2, s, d]."""
    return _Rotary.apply(x, cos_sin)
