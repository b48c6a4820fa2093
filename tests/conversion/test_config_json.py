"""config.json as transformers 4 and 5 write it, and what released models leave unsaid in it."""

from __future__ import annotations

from typing import Any

import pytest

from primus_bridge.conversion.architecture import Architecture, Rope
from primus_bridge.conversion.families import family_of
from primus_bridge.errors import ConfigError

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=203,
    max_position_embeddings=256,
)


def read(model_type: str, **changes: Any) -> Architecture:
    config = {"model_type": model_type, **SHAPE, **changes}
    return family_of(config, "config.json").architecture(config)


def refused(model_type: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read(model_type, **changes)
    return str(error.value)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        ("llama", {"rope_theta": 5e5, "rope_scaling": LINEAR}, {"rope_parameters": {"rope_theta": 5e5, **LINEAR}}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_parameters": {"rope_theta": 5e5, **LINEAR}}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5000},
         {"rope_parameters": {"rope_theta": 5000, "partial_rotary_factor": 0.5, "rope_type": "default"}}),
        ("glm4", {"partial_rotary_factor": 0.25, "head_dim": 16},
         {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_type": "default"}, "head_dim": 16}),
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR, "sliding_window_pattern": 2},
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, **LINEAR},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                },
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
         {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}),
    ],
)  # fmt: skip
def test_both_spellings_mean_the_same(model_type, old, new):
    first, second = (read(model_type, **spelling) for spelling in (old, new))
    assert (first.rope, first.local_rope, first.windows) == (second.rope, second.local_rope, second.windows)
    assert first.rope is not None


def test_ropes_of_gemma3():
    arch = read("gemma3_text", head_dim=16)
    assert arch.rope == Rope(1e6, 16, 256) and arch.local_rope == Rope(1e4, 16, 256)
    assert arch.windows == (4096, 4096, 4096, 4096)  # every sixth layer sees all
    assert read("gemma3_text", num_hidden_layers=6).windows[5] is None


def test_what_released_configs_leave_unsaid():
    """As transformers' own classes fill it in."""
    assert read("mistral").windows == (4096,) * 4 and read("mistral", sliding_window=None).windows == (None,) * 4
    assert not any(read("mixtral").windows)
    assert [read(kind).tied_embeddings for kind in ("gemma", "gemma2", "llama", "qwen2")] == [True, True, False, False]
    assert (read("gemma2").attention_softcap, read("gemma2").logit_softcap) == (50.0, 30.0)
    assert read("gemma", hidden_act="gelu", hidden_activation=None).activation == "gelu_tanh"
    assert read("gemma2", attn_logit_softcapping=None).attention_softcap is None
    assert read("qwen3").kv_channels == 128 and read("glm").kv_channels == 128
    assert not any(read("qwen2", sliding_window=7).windows)
    assert not any(read("qwen2", sliding_window=None, use_sliding_window=True, max_window_layers=0).windows)
    assert (read("mixtral").layernorm_epsilon, read("mixtral").rope) == (1e-5, Rope(1e6, 8, 256))
    assert read("qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=3).windows == (
        None,
        None,
        None,
        7,
    )
    assert read("falcon").num_query_groups == 1 and read("falcon", multi_query=False).num_query_groups == 8
    gpt2 = family_of({"model_type": "gpt2"}, "").architecture({"model_type": "gpt2"})
    assert (gpt2.ffn_hidden_size, gpt2.vocab_size, gpt2.tied_embeddings, gpt2.rope) == (3072, 50257, True, None)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("falcon", {"alibi": True}, "alibi positions (Falcon-RW) are not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "expected 4 of sliding_attention, full_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "an encoder, not a decoder"),
        ("qwen3_moe", {"mlp_only_layers": 1, "moe_intermediate_size": 8}, "expected a list of layers"),
        ("mixtral", {"num_local_experts": -1}, "num_local_experts is -1; expected a positive whole number"),
        ("deepseek_v2", {"n_routed_experts": 4, "moe_intermediate_size": 8, "topk_method": "noaux_tc"},
         "topk_method is 'noaux_tc'; supported for deepseek_v2: greedy, group_limited_greedy"),
        ("deepseek_v3", {"n_routed_experts": 4, "moe_intermediate_size": 8, "scoring_func": "softmax"},
         "scoring_func is 'softmax'; supported for deepseek_v3: sigmoid"),
        ("llama", {"rope_parameters": "none"}, "rope_parameters is 'none'; expected an object"),
        ("gemma3_text", {"rope_parameters": "none"}, "rope_parameters is 'none'; expected an object"),
        ("deepseek_v3", {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": "x"},
         "first_k_dense_replace is 'x'; expected a positive whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_with_the_reason(model_type, changes, message):
    assert message in refused(model_type, **changes)
