"""Dimensions of the models that recipes are for, as their config.json says them, and how many parameters they have."""

from __future__ import annotations

from typing import Any

NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
TIED: dict[str, Any] = dict(tie_word_embeddings=True)


def _config(model_type: str, dimensions: tuple[int, ...], **others: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(NAMES, dimensions, strict=True)), **others}


def _qwen2(dimensions: tuple[int, ...], **others: Any) -> dict[str, Any]:
    return _config("qwen2", dimensions, use_sliding_window=False, **others)


RELEASED: dict[str, tuple[int, dict[str, Any]]] = {
    "NousResearch/Meta-Llama-3-8B": (8_030_261_248, _config("llama", (4096, 14336, 32, 32, 8, 128256))),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, _config("llama", (4096, 14336, 32, 32, 8, 128256))),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, _config("llama", (2048, 8192, 16, 32, 8, 128256), head_dim=64, **TIED)),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, _config("llama", (3072, 8192, 28, 24, 8, 128256), head_dim=128, **TIED)),
    "meta-llama/Meta-Llama-3.1-70B": (70_553_706_496, _config("llama", (8192, 28672, 80, 64, 8, 128256))),
    "meta-llama/Llama-2-70b-hf": (68_976_648_192, _config("llama", (8192, 28672, 80, 64, 8, 32000))),
    "mistralai/Mistral-7B-v0.3": (7_248_023_552, _config("mistral", (4096, 14336, 32, 32, 8, 32768))),
    "mistralai/Mixtral-8x7B-v0.1": (
        46_702_792_704,
        _config("mixtral", (4096, 14336, 32, 32, 8, 32000), num_local_experts=8, num_experts_per_tok=2),
    ),
    "Qwen/Qwen2.5-0.5B": (494_032_768, _qwen2((896, 4864, 24, 14, 2, 151936), **TIED)),
    "Qwen/Qwen2.5-1.5B": (1_543_714_304, _qwen2((1536, 8960, 28, 12, 2, 151936), **TIED)),
    "Qwen/Qwen2.5-7B": (7_615_616_512, _qwen2((3584, 18944, 28, 28, 4, 152064))),
    "Qwen/Qwen2.5-14B": (14_770_033_664, _qwen2((5120, 13824, 48, 40, 8, 152064))),
    "Qwen/Qwen2.5-32B": (32_763_876_352, _qwen2((5120, 27648, 64, 40, 8, 152064))),
    "Qwen/Qwen2.5-72B": (72_706_203_648, _qwen2((8192, 29568, 80, 64, 8, 152064))),
    "Qwen/Qwen3-8B": (8_190_735_360, _config("qwen3", (4096, 12288, 36, 32, 8, 151936), head_dim=128)),
    "Qwen/Qwen3-32B": (32_762_123_264, _config("qwen3", (5120, 25600, 64, 64, 8, 151936), head_dim=128)),
    "Qwen/Qwen3-30B-A3B": (
        30_532_122_624,
        _config(
            "qwen3_moe",
            (2048, 6144, 48, 32, 4, 151936),
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
        ),
    ),
    "google/gemma-2-2b": (
        2_614_341_888,
        _config("gemma2", (2304, 9216, 26, 8, 4, 256000), head_dim=256, sliding_window=4096, query_pre_attn_scalar=256),
    ),
    "google/gemma-2-9b": (
        9_241_705_984,
        _config(
            "gemma2", (3584, 14336, 42, 16, 8, 256000), head_dim=256, sliding_window=4096, query_pre_attn_scalar=256
        ),
    ),
    "google/gemma-2-27b": (
        27_227_128_320,
        _config(
            "gemma2", (4608, 36864, 46, 32, 16, 256000), head_dim=128, sliding_window=4096, query_pre_attn_scalar=144
        ),
    ),
}
"""Hub id -> (parameters, what of config.json decides their shapes)."""
