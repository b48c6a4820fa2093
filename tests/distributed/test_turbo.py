"""Primus-Turbo's kernels in our model: a stand-in of its signatures, computed by torch, gives our own numbers.

The real package needs an AMD GPU; its signatures are those of primus_turbo/pytorch/ops.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace

import torch

from primus_bridge.conversion.architecture import Architecture
from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.rank_functions import Built

HEADS, GROUPS, D = 4, 2, 8
PLAIN = Architecture("x", 1, 32, 32, HEADS, GROUPS, D, 10, 1e-6, 999)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    bias=None,
    alibi_slopes=None,
    deterministic=False,
    return_lse=False,
    return_attn_probs=False,
    sink=None,
):
    """[b, s, heads, d] -> [b, s, heads, dv], causal and aligned at the lower right, in fp32 inside."""
    assert causal and dropout_p == 0.0 and window_size[1] in (-1, 0)
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (distance >= 0) if window_size[0] < 0 else (distance >= 0) & (distance <= window_size[0])
    scores = (q @ k.transpose(2, 3) * softmax_scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).to(torch.bfloat16)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    bias=None,
    alibi_slopes=None,
    deterministic=False,
    return_lse=False,
    return_attn_probs=False,
    sink=None,
):
    """[total, heads, d], documents back to back."""
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    bounds = cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(bounds))
    parts = [
        flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], dropout_p, softmax_scale, causal, window_size)[0]
        for a, b in pairwise(bounds)
    ]
    return torch.cat(parts)


def rmsnorm(x, gamma, eps=1e-6, zero_centered=False):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma.float()).to(x.dtype)


def ops() -> SimpleNamespace:
    return SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, rmsnorm=rmsnorm
    )


def attention(cases: list[tuple[list[int], int | None, int]]):
    """For documents of these lengths, window and rows: outputs and gradients in bf16, [ours, theirs]."""
    from primus_bridge.megatron.core_attention import SDPACoreAttention
    from primus_bridge.megatron.documents import Documents, Span
    from primus_bridge.megatron.turbo import put_kernels

    results = []
    for lengths, window, rows in cases:
        arch = Architecture("x", 1, 32, 32, HEADS, GROUPS, D, 10, 1e-6, 999, windows=(window,))
        core = SDPACoreAttention(SimpleNamespace(attention_dropout=0.0), 1, arch)
        ends = list(pairwise([0, *accumulate(lengths)]))
        documents = Documents(tuple(Span(0, *end) for end in ends), True) if len(lengths) > 1 else None
        pair = []
        for turbo in (False, True):
            if turbo:
                put_kernels(core, ["use_turbo_attention"], ops())
                assert core.flash is not None
            generator = torch.Generator().manual_seed(0)
            shapes = [(sum(lengths), rows, heads, D) for heads in (HEADS, GROUPS, GROUPS)]
            inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
            out = core(*inputs, documents=documents)
            out.float().square().sum().backward()
            pair.append([out.detach(), *(t.grad for t in inputs)])
        results.append(pair)
    return results


def test_attention_over_rows_windows_and_documents():
    cases = [([70], None, 2), ([70], 9, 2), ([5, 40, 1, 30], None, 1), ([5, 40, 1, 30], 9, 1)]
    for ours, theirs in run_distributed(attention, 1, cases)[0]:
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(other, mine, rtol=3e-2, atol=3e-2)


def whole_model(folder: str):
    """Logits of a model with norms of heads and of layers, in bf16: ours, and with all kernels."""
    from primus_bridge.config.arguments import BridgeArguments
    from primus_bridge.megatron.core_attention import SDPACoreAttention
    from primus_bridge.megatron.norm import RMSNorm
    from primus_bridge.megatron.turbo import SWITCHES, put_kernels

    arguments = BridgeArguments(mixed_precision="bf16_mixed")
    (chunk,) = Built(folder, arguments, optimizer=False).chunks
    ids = torch.arange(48)[None] * 7 % 200
    with torch.no_grad():
        ours = chunk.logits(ids)
        put_kernels(chunk, SWITCHES, ops())
        norms = [m.kernel is rmsnorm for m in chunk.modules() if isinstance(m, RMSNorm)]
        attentions = [m.flash is not None for m in chunk.modules() if isinstance(m, SDPACoreAttention)]
        return ours, chunk.logits(ids), norms, attentions


def test_a_whole_model(tmp_path):
    ours, theirs, norms, attentions = run_distributed(whole_model, 1, tiny_models.save("qwen3", tmp_path / "m"))[0]
    # each layer's two norms and its heads' two, and the last
    assert norms == [True] * (4 * 4 + 1) and attentions == [True] * 4
    assert (theirs - ours).abs().max() < 0.03 * ours.abs().max()


def test_what_is_not_there_is_told_once(tmp_path, monkeypatch):
    from primus_bridge.config import load_arguments
    from primus_bridge.megatron.turbo import kernels_used, note_unused_kernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--use_turbo_attention", "--use_turbo_rms_norm", "--save", "s"]

    def told(*more: str, arch: Architecture = PLAIN) -> list[str]:
        arguments = load_arguments(None, [*words, *more])
        note_unused_kernels(arguments, arch)
        note_unused_kernels(arguments, arch)
        assert there or kernels_used(arguments.model, arguments.dist.device) == []
        return arguments.notes

    there = False

    both = "command line --use_turbo_attention: 'use_turbo_attention' and 'use_turbo_rms_norm' have no effect here: "
    assert told() == [both + "enable_primus_turbo is not true; our own kernels are used"]
    assert told("--enable_primus_turbo") == [
        both + "the package primus_turbo is not installed; our own kernels are used"
    ]
    (tmp_path / "primus_turbo").mkdir()
    (tmp_path / "primus_turbo" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert told("--enable_primus_turbo") == [both + "there is no GPU; our own kernels are used"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_cpu = ("--enable_primus_turbo", "--device", "cpu")
    assert told(*on_cpu) == [both + "device is cpu; our own kernels are used"]
    there, bf16 = True, ("--enable_primus_turbo", "--bf16")
    assert told(*bf16) == []
    attention = "command line --use_turbo_attention: 'use_turbo_attention' has no effect here: their attention "
    assert told("--enable_primus_turbo") == [attention + "is of bf16, and the run of fp32; our own kernels are used"]
    capped = replace(PLAIN, attention_softcap=50.0)
    assert told(*bf16, arch=capped) == [attention + "has no soft cap, which the model has; our own kernels are used"]


def test_a_dry_run_tells_it(tmp_path, capsys):
    from primus_bridge.cli.main import main
    from tests.cli.example import alpaca_rows, workplace, write_rows

    with workplace(tmp_path) as root:
        write_rows(root / "rows.json", alpaca_rows(4))
        words = "--convert_from_hf --hf_model_name_or_path model --data_path rows.json --save out --device cpu"
        assert main(["train", *words.split(), "--use_turbo_attention", "--dry_run", "--seq_length", "64"]) == 0
        assert "note: command line --use_turbo_attention: 'use_turbo_attention' has no" in capsys.readouterr().out
        assert main(["train", *words.split(), "--dry_run", "--num_layers", "2"]) == 2
        assert "command line --num_layers: 'num_layers' is 2, and 4 in the model's" in capsys.readouterr().err


def test_the_package_is_used_where_there_is_a_gpu(tmp_path, monkeypatch):
    from primus_bridge.config.arguments import ModelArguments
    from primus_bridge.megatron.norm import RMSNorm
    from primus_bridge.megatron.turbo import use_kernels

    folder = tmp_path / "primus_turbo" / "pytorch"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").write_text("")
    (folder / "ops.py").write_text(
        "def rmsnorm(x, gamma, eps=1e-6, zero_centered=False):\n    return x * gamma * eps\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = SimpleNamespace(layernorm_zero_centered_gamma=True, sequence_parallel=False)
    chunk = torch.nn.Sequential(RMSNorm(config, 4, eps=0.5))
    use_kernels(chunk, ModelArguments(use_turbo_rms_norm=True))
    assert chunk[0].kernel is None
    use_kernels(chunk, ModelArguments(enable_primus_turbo=True, use_turbo_rms_norm=True))
    assert torch.equal(chunk(torch.ones(4)), torch.ones(4))  # 1 * (1 + 1) * 0.5
