"""Which rank does what: the places of Megatron's rank order, and a picture of them."""

from __future__ import annotations

from dataclasses import dataclass

from primus_bridge.config.arguments import ModelArguments

MOST_REPLICAS = 4
"""Data-parallel replicas that the picture draws; the others are counted."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the whole job; data follows from the number of ranks."""

    tensor: int
    context: int
    data: int
    pipeline: int
    virtual: int
    expert: int

    @classmethod
    def of(cls, model: ModelArguments, ranks: int) -> Layout:
        tensor, context = model.tensor_model_parallel_size, model.context_parallel_size
        pipeline = model.pipeline_model_parallel_size
        data = max(1, ranks // (tensor * context * pipeline))
        virtual = model.virtual_pipeline_model_parallel_size or 1
        return cls(tensor, context, data, pipeline, virtual, model.expert_model_parallel_size)

    def rank(self, tensor: int, context: int, data: int, pipeline: int) -> int:
        """The global rank at a place. Source: Megatron-Core's default order, tp-cp-ep-dp-pp, innermost first."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def says(self) -> str:
        """``tensor 2 x pipeline 2 x data 4``."""
        parts = [f"tensor {self.tensor}", f"pipeline {self.pipeline}"]
        parts += [f"context {self.context}"] if self.context > 1 else []
        return " x ".join([*parts, f"data {self.data}"])


def picture(layout: Layout) -> str:
    """A table: a column a pipeline stage, a row a data-parallel replica, in each cell its tensor-parallel ranks."""
    heads = "".join(f'<th scope="col">stage {stage}</th>' for stage in range(layout.pipeline))
    rows = "".join(
        f'<tr><th scope="row">replica {data}</th>'
        + "".join(f"<td>{_cell(layout, data, stage)}</td>" for stage in range(layout.pipeline))
        + "</tr>"
        for data in range(min(layout.data, MOST_REPLICAS))
    )
    left = layout.data - MOST_REPLICAS
    more = f'<p class="foot">and {left:,} more replica{"s" * (left > 1)} like these</p>' if left > 0 else ""
    table = f'<table class="ranks"><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="group" aria-label="Ranks by place">{table}</div>{more}'


def _cell(layout: Layout, data: int, stage: int) -> str:
    def chip(tensor: int, context: int) -> str:
        return f'<li class="g{stage % 6}">{layout.rank(tensor, context, data, stage)}</li>'

    lists = []
    for context in range(layout.context):
        name = f' aria-label="context {context}"' if layout.context > 1 else ""
        lists.append(f"<ul{name}>{''.join(chip(tensor, context) for tensor in range(layout.tensor))}</ul>")
    return "".join(lists)
