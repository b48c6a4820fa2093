"""Self-attention as operations: fused kernels keep query, key, value, output and a number a head, never the scores."""

from __future__ import annotations

from typing import Optional

from primus_bridge.plan.linear import Linears
from primus_bridge.plan.operations import FP32, MicroBatch, Operation

# megatron/core_attention.py's: below so many keys a CPU computes in fp32; queries at a time where scores are made
FP32_KEYS = 256
QUERY_BLOCK = 1024


def attention(linears: Linears, source: str) -> list[Operation]:
    """From the (normed) residual stream to what is added to it."""
    batch = linears.batch
    ahead = _latent_projections(linears, source) if batch.arch.mla is not None else _projections(linears, source)
    width = batch.arch.attention_size // batch.layout.tensor
    output = "attention output"
    project = linears.row("self_attention.linear_proj", output, width, batch.arch.hidden_size)
    return [*ahead, *_core(linears, output), project]


def _local_sizes(batch: MicroBatch) -> tuple[int, int]:
    """(query, key or value) numbers a position of this rank; with more ranks than groups, of the group it shares."""
    arch, ranks = batch.arch, batch.layout.tensor
    groups = max(arch.num_query_groups // ranks, 1)
    return arch.q_size // ranks, groups * arch.kv_channels


def _projections(linears: Linears, source: str) -> list[Operation]:
    batch, arch = linears.batch, linears.batch.arch
    query, key = _local_sizes(batch)
    bytes_of = batch.positions * batch.element
    qkv = arch.qkv_size // batch.layout.tensor
    operations = [linears.column("self_attention.linear_qkv", source, arch.hidden_size, qkv, "qkv")]
    both = (query + 2 * key) * bytes_of
    operations.append(Operation({}, both, both))  # the split, with rotary
    normed = (query + key) * batch.positions
    if arch.qk_norm == "head":
        heads = normed // arch.kv_channels
        operations.append(
            Operation(
                {"query and key": normed * batch.element, "statistics of query and key": heads * FP32},
                both,
                both,
                scratch=2 * normed * FP32,
            )
        )
    elif arch.qk_norm == "all":
        # a chain of torch's own operations: in fp32, and rounded before the weight
        wide = normed * (FP32 + (batch.element if batch.full else 0))
        operations.append(Operation({"query and key": wide}, both, both, scratch=2 * normed * FP32))
    if arch.clip_qkv is not None:
        operations.append(Operation({"unclipped": both}, both, both))
    return operations


def _latent_projections(linears: Linears, source: str) -> list[Operation]:
    batch, arch, mla = linears.batch, linears.batch.arch, linears.batch.arch.mla
    assert mla is not None
    ranks, stream, element = batch.layout.tensor, batch.stream_positions, batch.element
    attend = "self_attention."
    query = arch.q_size // ranks
    operations = []
    if mla.q_lora_rank is None:
        operations.append(linears.column(attend + "linear_q_proj", source, arch.hidden_size, query, "query"))
    else:
        rank = mla.q_lora_rank
        operations += [
            linears.replicated(attend + "linear_q_down_proj", source, arch.hidden_size, rank, "small query"),
            Operation({"small query": stream * rank * element, "statistics of small query": stream * FP32}),
            linears.column(attend + "linear_q_up_proj", "normed small query", rank, query, "query"),
        ]
    latent, key_value = mla.kv_lora_rank, arch.kv_up_size // ranks
    operations += [
        linears.replicated(attend + "linear_kv_down_proj", source, arch.hidden_size, arch.kv_down_size, "latent"),
        # the norm keeps a part of the projection's output, and with it all of that
        Operation({"latent": stream * arch.kv_down_size * element, "statistics of latent": stream * FP32}),
        linears.column(attend + "linear_kv_up_proj", "normed latent", latent, key_value, "key and value"),
    ]
    heads = arch.num_attention_heads // ranks
    joined = 2 * heads * arch.kv_channels * batch.positions * element
    operations.append(Operation({}, joined, joined))  # query and key with their rotated parts
    return operations


def _core(linears: Linears, output: str) -> list[Operation]:
    batch = linears.batch
    arch, positions = batch.arch, batch.positions
    window = visible_window(batch, linears.layer)
    ranks, context = batch.layout.tensor, batch.layout.context
    query, key = _local_sizes(batch)
    if arch.mla is not None:
        query = key = arch.num_attention_heads // ranks * arch.kv_channels
    value = key
    heads = query // arch.kv_channels
    element = batch.element
    queries, keys = _block(batch, window)
    wide = batch.cpu and element != FP32 and arch.attention_softcap is None and (keys <= FP32_KEYS or batch.packed)
    inside = FP32 if wide else element
    made = positions * arch.attention_size // ranks * element
    # kernels of a GPU take groups only in bf16 and without a mask: else key and value are repeated for each head
    masked = window is not None or arch.attention_softcap is not None
    repeated = (not batch.cpu and (element == FP32 or masked)) or arch.attention_softcap is not None
    # blocks share keys: views of one tensor, but for copies in fp32, which each block has of its own
    copies = keys / queries if wide and not batch.packed else context
    given = {
        "query": positions * query * inside,
        "key": positions * copies * (query if repeated else key) * inside,
        "value": positions * copies * (query if repeated else value) * inside,
    }
    computed: dict[str, float] = {output: made, "sums of exponentials": positions * heads * FP32}
    # what the kernel puts out is kept beside its copy: of another dtype, or size, or joined from blocks
    blocks = (batch.packed and batch.cpu) or context > 1 or queries < batch.length
    if wide or blocks or arch.mla is not None:
        computed["output of the kernel"] = positions * query * inside
    gradients = sum(given.values())
    scratch = 0.0
    if arch.attention_softcap is not None:
        computed |= _capped_scores(batch, heads, keys)
        # scores, their tanh, the masked ones, the weights and a gradient
        scratch = 5 * min(QUERY_BLOCK, queries) * keys * batch.rows * heads * FP32
    elif batch.cpu and batch.attention_dropout:
        # no fused kernel of a CPU has dropout: weights, mask and their product are kept
        scores = batch.rows * heads * batch.length * (batch.length // context) * inside
        computed["attention weights"] = 3 * scores
        scratch = 2 * scores
    elif not batch.cpu:
        # flash attention adds up the queries' gradient in fp32, and gives each head its own of key and value
        scratch = positions * query * FP32 + (2 * positions * query * inside if query != key else 0)
    if batch.selective:
        # only its inputs are kept, and its output as the next linear's input; the rest is made again
        again = sum(computed.values()) + scratch
        plain = {"query": query, "key": key, "value": value}
        asked: dict[str, float] = {name: positions * width * element for name, width in plain.items()}
        return [Operation(asked | {output: made}, gradients, made, scratch=again)]
    return [Operation(given | computed, gradients, made, scratch=scratch)]


def _block(batch: MicroBatch, window: Optional[int]) -> tuple[int, int]:
    """(queries, keys) of what attention computes at a time: with a window a few queries and the keys they see."""
    if window is None:
        return batch.length // batch.layout.context, batch.length
    queries = min(max(window, 128), batch.length // batch.layout.context)
    return queries, min(queries + window, batch.length)


def visible_window(batch: MicroBatch, layer: int) -> Optional[int]:
    """The layer's window where it is shorter than the sequences; else None: each position sees all before it."""
    window = batch.arch.window(layer)
    return window if window is not None and window < batch.length else None


def _capped_scores(batch: MicroBatch, heads: int, keys: int) -> dict[str, float]:
    """Soft caps need the scores: those of long sequences are made again, a block at a time (counted as scratch)."""
    queries = batch.length // batch.layout.context
    scores = batch.rows * heads * queries * keys
    if queries * keys > QUERY_BLOCK**2:
        return {}
    # tanh keeps its output, softmax its own in fp32, and the product with the values that in its dtype
    wide = FP32 + batch.element if batch.element != FP32 else FP32
    return {"scores": scores * (batch.element + wide)}
