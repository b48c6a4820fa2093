"""--shrink: what released config.json's become, and that both sides take it."""

from __future__ import annotations

import json

import pytest

from primus_bridge.conversion.families import families
from primus_bridge.conversion.rules import expected_hf_tensors
from primus_bridge.verify.shrink import SEQ_LENGTH, VOCAB_SIZE, WINDOW, layer_kinds, shrunk_config
from tests.verify.released import RELEASED


def whole_and_small(name: str, **layout):
    config = RELEASED[name]
    family = families()[config["model_type"]]
    small = shrunk_config(config, family.architecture, **layout)
    return family.architecture(config), family.architecture(small), small


def test_every_family_is_among_the_released():
    assert {config["model_type"] for config in RELEASED.values()} == set(families())


@pytest.mark.parametrize("name", RELEASED)
def test_it_is_small_and_of_the_same_architecture(name):
    whole, small, config = whole_and_small(name)
    sizes = expected_hf_tensors(families()[whole.model_type].rules, small)
    assert sum(a * b for a, b in ((*shape, 1)[:2] for shape in sizes.values())) < 3_000_000
    assert (small.num_layers <= 4) and small.vocab_size == VOCAB_SIZE
    # the kinds of layers, in the same order at the start
    assert set(layer_kinds(small)) == set(layer_kinds(whole))
    assert layer_kinds(small)[0] == layer_kinds(whole)[0]
    # the ratios that code depends on
    groups, small_groups = whole.num_query_groups, small.num_query_groups
    assert (small_groups == 1) == (groups == 1) and small.num_attention_heads % small_groups == 0
    assert (small_groups == small.num_attention_heads) == (groups == whole.num_attention_heads)
    if 1 < groups < whole.num_attention_heads:
        assert small.num_attention_heads // small_groups == whole.num_attention_heads // groups
    if whole.mla is None:
        assert (small.hidden_size < small.q_size, small.hidden_size > small.q_size) == (
            whole.hidden_size < whole.q_size,
            whole.hidden_size > whole.q_size,
        )
    # every flag
    for flag in (
        "tied_embeddings norm zero_centered_norm residual qk_norm qkv_bias attention_out_bias mlp_bias gated_mlp "
        "activation layernorm_epsilon embedding_multiplier residual_multiplier logits_divisor"
    ).split():
        if flag != "embedding_multiplier" or not whole.model_type.startswith("gemma"):
            assert getattr(small, flag) == getattr(whole, flag), flag
    for cap in ("attention_softcap", "logit_softcap"):
        assert (getattr(small, cap) is None) == (getattr(whole, cap) is None)
    assert small.windows == tuple(window and WINDOW for window in small.windows)
    assert "quantization_config" not in config and "auto_map" not in config


@pytest.mark.parametrize("name", RELEASED)
def test_positions_are_scaled_as_in_the_whole_model_and_reached(name):
    whole, small, config = whole_and_small(name)
    if whole.rope is None:
        assert small.rope is None and small.max_position_embeddings >= SEQ_LENGTH
        return
    assert small.rope.dim % 2 == 0 and small.rope.dim >= 4
    assert small.rope.dim / small.kv_channels == pytest.approx(whole.rope.dim / whole.kv_channels)
    assert small.rope.interleaved == whole.rope.interleaved
    if whole.rope.scaling is None:
        assert small.rope.scaling is None
        return
    for key, value in whole.rope.scaling.items():
        if key == "original_max_position_embeddings":
            original = small.rope.scaling[key]
            assert original < SEQ_LENGTH
            assert small.max_position_embeddings / original == whole.max_position_embeddings / value
        elif isinstance(value, list):
            short = small.rope.scaling[key]
            assert len(short) == small.rope.dim // 2 and (short[0], short[-1]) == (value[0], value[-1])
        else:
            assert small.rope.scaling[key] == value


@pytest.mark.parametrize("name", [name for name, config in RELEASED.items() if "num_experts_per_tok" in config])
def test_experts_keep_their_groups(name):
    whole, small, _ = whole_and_small(name, expert=4)
    assert small.moe.num_experts % 4 == 0 and small.moe.num_experts > small.moe.top_k > 1
    assert (small.moe.groups > 1) == (whole.moe.groups > 1)
    if small.moe.groups > 1:
        assert small.moe.num_experts // small.moe.groups >= small.moe.group_scores
        assert small.moe.top_groups * small.moe.num_experts // small.moe.groups >= small.moe.top_k
    for flag in ("score", "normalise", "scaling", "group_scores", "selection_bias", "shared_gate"):
        assert getattr(small.moe, flag) == getattr(whole.moe, flag), flag
    assert bool(small.moe.shared_ffn_hidden_size) == bool(whole.moe.shared_ffn_hidden_size)


def test_the_layout_divides_it():
    _, small, _ = whole_and_small("llama-3.1-8b", tensor=8, pipeline=4)
    assert small.num_query_groups % 8 == 0 and small.ffn_hidden_size % 8 == 0 and small.num_layers == 4


def test_patterns_of_layers():
    config = RELEASED["qwen2.5-7b"] | dict(use_sliding_window=True, max_window_layers=21)
    read = families()["qwen2"].architecture
    assert read(shrunk_config(config, read)).windows == (None, None, WINDOW, WINDOW)
    listed = RELEASED["gemma-3-1b"] | dict(
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2
    )
    del listed["sliding_window_pattern"]
    read = families()["gemma3_text"].architecture
    assert read(shrunk_config(listed, read)).windows == (WINDOW, None, WINDOW, None)
    # nothing said at all: transformers' defaults
    silent = {key: value for key, value in listed.items() if key not in ("layer_types", "head_dim", "sliding_window")}
    assert read(shrunk_config(silent, read)).windows == (WINDOW, None, WINDOW, None)
    assert read(shrunk_config(silent, read)).kv_channels == 16


def test_the_spelling_of_transformers_5():
    nested = RELEASED["gemma-3-1b"] | dict(
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            "sliding_attention": dict(rope_type="default", rope_theta=1e4),
        }
    )
    read = families()["gemma3_text"].architecture
    assert read(shrunk_config(nested, read)).rope.scaling["factor"] == 8.0
    llama = {key: value for key, value in RELEASED["llama-3.1-8b"].items() if not key.startswith("rope")}
    llama["rope_parameters"] = dict(RELEASED["llama-3.1-8b"]["rope_scaling"], rope_theta=5e5)
    read = families()["llama"].architecture
    small = read(shrunk_config(llama, read))
    assert small.rope.base == 5e5 and small.rope.scaling["original_max_position_embeddings"] == SEQ_LENGTH // 2


def test_it_does_not_change_what_it_is_given():
    before = json.dumps(RELEASED, sort_keys=True)
    for name in RELEASED:
        whole_and_small(name)
    assert json.dumps(RELEASED, sort_keys=True) == before
