"""What a config says of the model's shape is compared with its config.json, and a difference names its place."""

from __future__ import annotations

import dataclasses

import pytest

from primus_bridge.config import load_arguments
from primus_bridge.config.merge import Compared
from primus_bridge.config.native import native_keys
from primus_bridge.conversion.architecture import Architecture, LatentAttention, MixtureOfExperts, Rope
from primus_bridge.errors import ConfigError
from primus_bridge.preflight import SHAPE, fit_to_model

DENSE = Architecture("llama", 4, 64, 96, 8, 4, 8, 200, 1e-5, 256, rope=Rope(500000.0, 8, 256))
EXPERTS = dataclasses.replace(DENSE, moe=MixtureOfExperts((True,) * 4, 8, 2, 32))
LATENT = dataclasses.replace(DENSE, mla=LatentAttention(None, 16, 12, 4, 12))
AGREES = "--num_layers 4 --hidden_size 64 --num_attention_heads 8 --norm_epsilon 1e-5"
DENSE_TOO = "--num_query_groups 4 --ffn_hidden_size 96 --rotary_base 500000 --kv_channels 8"
# as Primus's base presets have them for models without such parts
NOT_THERE = "--moe_router_topk 2 --kv_lora_rank 32 --qk_head_dim 128 --qk_pos_emb_head_dim 64 --v_head_dim 128"


def fit(arch: Architecture, words: str) -> None:
    fit_to_model(load_arguments(None, words.split()), arch)


def test_every_key_has_its_place_in_the_architecture():
    assert {name for name, entry in native_keys().items() if isinstance(entry, Compared)} == set(SHAPE)


@pytest.mark.parametrize(
    "arch, words",
    [
        (DENSE, f"{AGREES} {DENSE_TOO} {NOT_THERE} --init_method_std 0.5"),
        (EXPERTS, f"{AGREES} --num_experts 8 --moe_router_topk 2 --moe_ffn_hidden_size 32 --ffn_hidden_size 7"),
        (LATENT, f"{AGREES} --kv_channels 128 --kv_lora_rank 16 --qk_head_dim 12 --v_head_dim 12"),
        (DENSE, "--stage pretrain --init_method_std 0.02"),
        (DENSE, "--stage pretrain --init_method_std 0.008 --load ckpt"),
        (dataclasses.replace(DENSE, rope=None), "--rotary_base 10000 --seq_length 256"),
    ],
)
def test_what_agrees_or_concerns_no_part_of_the_model(arch, words):
    fit(arch, words)


@pytest.mark.parametrize(
    "arch, words, there",  # the value as YAML would write it
    [
        (DENSE, "--rotary_base 1000000", "500000.0"),
        (DENSE, "--norm_epsilon 1e-3", "1e-05"),
        (DENSE, "--num_layers 2", "4"),
        (DENSE, "--hidden_size 65", "64"),
        (DENSE, "--ffn_hidden_size 95", "96"),
        (DENSE, "--num_attention_heads 4", "8"),
        (DENSE, "--num_query_groups 8", "4"),
        (DENSE, "--kv_channels 16", "8"),
        (DENSE, "--num_experts 8", "0"),
        (EXPERTS, "--num_experts 4", "8"),
        (EXPERTS, "--moe_router_topk 1", "2"),
        (EXPERTS, "--moe_ffn_hidden_size 31", "32"),
        (EXPERTS, "--moe_shared_expert_intermediate_size 8", "0"),
        (LATENT, "--kv_lora_rank 32", "16"),
        (LATENT, "--q_lora_rank 32", "null"),
        (DENSE, "--stage pretrain --init_method_std 0.008", "0.02"),
    ],
)
def test_what_differs(arch, words, there):
    *_, key, _ = words.split()
    with pytest.raises(ConfigError) as caught:
        fit(arch, words)
    said = str(caught.value)
    assert said.startswith(f"command line {key}: '{key[2:]}' is ")
    assert f", and {there} in the model's config.json" in said and said.endswith(f"leave it out, or write {there}")
