"""The verdict of ``primus verify``: a line a stage, what diverges first, and the same as JSON.

The JSON object: model, against, model_type, shrunk, parameters, layout (tensor, pipeline, expert, expert_tensor,
sequence_parallel, ranks), dtype, batch, seq_length, seed, tolerance, notes, equal, and
    stages     a list in the order of the computation; each has stage ("weights" with --against, "embedding",
               "layer N", "final norm", "logits", "loss", "gradients"), max_abs_error, relative_error,
               reference_max, equal; activations also differing_tokens (0 to 1: how many are beyond the tolerance), a
               layer also parts ({"attention": {...}, "mlp": {...}}: their own outputs, before the residual), weights
               and gradients also tensor, the worst one
    gradients  Hugging Face name -> {max_abs_error, relative_error, reference_max, equal}
    first      null, or what diverges first: stage, part ("attention", "mlp" or null), relative_error, the worst
               tensor there with tensor_relative_error, tensor_by ("weights" or "gradient"), hint (a sentence or null)
A number that is not finite is null.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional

from primus_bridge.verify.compare import NEGLIGIBLE, Difference, Differences, Place
from primus_bridge.verify.plan import Plan

WEIGHTS, LOSS, GRADIENTS = "weights", "loss", "gradients"
FEW_TOKENS = 0.05


@dataclass(frozen=True)
class Line:
    """One stage. parts: of a layer, attention and mlp; tensor: of weights and gradients, the worst one."""

    stage: str
    difference: Difference
    relative: float
    equal: bool
    tensor: Optional[str] = None
    parts: dict[str, Line] = field(default_factory=dict)


@dataclass(frozen=True)
class First:
    """What diverges first. worst: of the tensors there, by their weights or else by their gradients."""

    stage: str
    relative: float
    part: Optional[str]
    worst: Optional[Line]
    by_weights: bool
    hint: Optional[str] = None

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "part": self.part,
            "relative_error": _finite(self.relative),
            "tensor": self.worst.stage if self.worst else None,
            "tensor_relative_error": _finite(self.worst.relative) if self.worst else None,
            "tensor_by": "weights" if self.by_weights else "gradient",
            "hint": self.hint,
        }


@dataclass(frozen=True)
class Report:
    """Everything that was compared, judged."""

    plan: Plan
    lines: list[Line]
    gradients: list[Line]
    """A line a tensor; ``stage`` is its name."""
    first: Optional[First]

    @property
    def equal(self) -> bool:
        return all(line.equal for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """See the first lines of this file."""
        plan = self.plan
        options, model = plan.options, plan.arguments.model
        return {
            "model": options.hf,
            "against": options.against,
            "model_type": plan.architecture.model_type,
            "shrunk": options.shrink,
            "parameters": plan.parameters,
            "layout": {
                "tensor": model.tensor_model_parallel_size,
                "pipeline": model.pipeline_model_parallel_size,
                "expert": model.expert_model_parallel_size,
                "expert_tensor": model.expert_tensor_parallel_size or model.tensor_model_parallel_size,
                "sequence_parallel": model.sequence_parallel,
                "ranks": plan.ranks,
            },
            "dtype": options.dtype,
            "batch": plan.rows,
            "seq_length": plan.seq_length,
            "seed": options.seed,
            "tolerance": plan.tolerance,
            "notes": plan.notes,
            "equal": self.equal,
            "stages": [{"stage": line.stage, **_numbers(line)} for line in self.lines],
            "gradients": {line.stage: _numbers(line) for line in self.gradients},
            "first": self.first.to_json() if self.first else None,
        }


def _finite(number: float) -> Optional[float]:
    return number if math.isfinite(number) else None


def _numbers(line: Line) -> dict[str, Any]:
    out: dict[str, Any] = {
        "max_abs_error": _finite(line.difference.absolute),
        "relative_error": _finite(line.relative),
        "reference_max": _finite(line.difference.reference),
        "equal": line.equal,
    }
    if line.tensor is not None:
        out["tensor"] = line.tensor
    if line.difference.share is not None:
        out["differing_tokens"] = line.difference.share
    if line.parts:
        out["parts"] = {name: _numbers(part) for name, part in line.parts.items()}
    return out


def judge(
    plan: Plan,
    activations: Differences,
    loss: Difference,
    gradients: Differences,
    weights: Optional[Differences],
    places: dict[str, Place],
) -> Report:
    """The report. weights: of ours against the reference folder's, where that is another one."""
    tolerance = plan.tolerance

    def line(stage: str, difference: Difference, floor: float = 0.0, **more: Any) -> Line:
        relative = difference.relative(floor)
        return Line(stage, difference, relative, relative <= tolerance, **more)

    floor = NEGLIGIBLE * max((difference.reference for difference in gradients.values()), default=0.0)
    # the router's bias on the choice of experts has no gradient
    lost = [name for name in places if name not in gradients and not name.endswith("e_score_correction_bias")]
    assert not lost, f"no rank has compared {lost[:3]}"
    gradient_lines = [line(name, gradients[name], floor) for name in places if name in gradients]
    weight_lines = [line(name, weights[name]) for name in places if name in weights] if weights is not None else []
    lines: list[Line] = []
    if weight_lines:
        lines.append(_worst(WEIGHTS, weight_lines))
    for stage in _stages(plan.architecture.num_layers):
        parts = {
            part: line(f"{stage} {part}", activations[f"{stage} {part}"])
            for part in ("attention", "mlp")
            if f"{stage} {part}" in activations
        }
        lines.append(line(stage, activations[stage], parts=parts))
    lines.append(line(LOSS, loss))
    lines.append(_worst(GRADIENTS, gradient_lines))
    return Report(
        plan,
        lines,
        gradient_lines,
        _first(lines, weight_lines, gradient_lines, places, plan.architecture.moe is not None),
    )


def _stages(layers: int) -> Iterator[str]:
    yield "embedding"
    yield from (f"layer {layer}" for layer in range(layers))
    yield from ("final norm", "logits")


def _worst(stage: str, tensors: list[Line]) -> Line:
    worst = max(tensors, key=lambda tensor: tensor.relative)
    return Line(stage, worst.difference, worst.relative, worst.equal, tensor=worst.stage)


def _first(
    lines: list[Line], weights: list[Line], gradients: list[Line], places: dict[str, Place], experts: bool
) -> Optional[First]:
    """The first stage of the forward pass that differs; if none does, the first one of the backward pass."""
    for line in lines:
        if line.equal or line.stage in (WEIGHTS, GRADIENTS):
            continue
        part = next((name for name, one in line.parts.items() if not one.equal), None)
        where = Place(line.stage, part)
        by_weights = _worst_at(where, weights, places)
        worst = by_weights or _worst_at(where, gradients, places)
        return First(line.stage, line.relative, part, worst, by_weights is not None, _hint(line, part, experts))
    # weights that differ too little to show in a stage, or backward
    for tensors, stage in ((weights, WEIGHTS), (gradients[::-1], GRADIENTS)):
        differing = [tensor for tensor in tensors if not tensor.equal]
        if differing:
            place = places[differing[0].stage]
            worst = _worst_at(place, differing, places)
            assert worst is not None
            return First(f"{stage} of {place.stage}", worst.relative, place.part, worst, stage == WEIGHTS)
    return None


def _hint(line: Line, part: Optional[str], experts: bool) -> Optional[str]:
    """What a difference of few tokens after experts looks like."""
    share = line.difference.share
    if not experts or part != "mlp" or share is None or share > FEW_TOKENS:
        return None
    return (
        f"only {share:.1%} of the tokens differ there, which is what a near tie between experts looks like "
        "that rounding decides: try another --seed"
    )


def _worst_at(where: Place, tensors: list[Line], places: dict[str, Place]) -> Optional[Line]:
    """The worst tensor that differs at a place: of its part (None: outside attention and MLP), else of its stage."""
    stage = [tensor for tensor in tensors if not tensor.equal and places[tensor.stage].stage == where.stage]
    found = [tensor for tensor in stage if places[tensor.stage].part == where.part] or stage
    return max(found, key=lambda tensor: tensor.relative, default=None)
