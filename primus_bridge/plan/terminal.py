"""A plan on the terminal: 80 columns, stages and memory as bars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable, Optional

from primus_bridge.config import describe, schema
from primus_bridge.peft.plan import describe as describe_adapters
from primus_bridge.plan.layout import Chunk
from primus_bridge.plan.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

GB = 1e9
STAGE_BAR, MEMORY_BAR = 40, 40
UNEVEN = 1.05
"""Of the slowest stage's work, as a multiple of the mean: from here on it is told."""
PARTS = (
    ("weights", "\u2588", "blue"),
    ("gradients", "\u2593", "cyan"),
    ("optimizer", "\u2592", "magenta"),
    ("activations", "\u2591", "green"),
    ("working", "\u00b7", "yellow"),
)
"""Of a rank's memory: its name in StageMemory, the letter of its bar, its colour."""


def show(plan: Plan, console: Optional[Console] = None) -> None:
    """Print the whole plan."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(markup=False, emoji=False, highlight=False)
    for line in _lines(plan):
        console.print(line, soft_wrap=isinstance(line, Text))


def _lines(plan: Plan) -> Iterator[Any]:
    from rich.text import Text

    def line(name: str, text: str) -> Text:
        return Text.assemble((f"{name:<10}", "bold"), text)

    yield line("model", _model(plan))
    yield line("training", _training(plan))
    yield line("layout", plan.layout.describe())
    yield line("batch", _batch(plan))
    yield from _steps(plan, line)
    yield Text()
    yield from _stages(plan)
    yield Text()
    yield from _memory(plan)
    yield Text()
    yield from _verdict(plan)
    yield Text()
    yield from _arguments(plan)


def _model(plan: Plan) -> str:
    arch = plan.model.architecture
    text = f"{plan.model.name} ({arch.model_type}, {arch.num_layers} layers), {many(plan.parameters)} parameters"
    if plan.active_parameters != plan.parameters:
        text += f", {many(plan.active_parameters)} work on a token"
    return text


def _training(plan: Plan) -> str:
    arguments, trained = plan.arguments, "all weights"
    if plan.adapters is not None:
        trained = describe_adapters(arguments.peft)
    recompute = arguments.model.recompute_granularity
    again = f", recompute {recompute}" if recompute else ""
    return f"{arguments.stage}, {trained}, {arguments.mixed_precision}{again}"


def _batch(plan: Plan) -> str:
    train, layout, steps = plan.arguments.train, plan.layout, plan.steps
    return (
        f"{train.global_batch_size} sequences a step: {layout.data} data-parallel x {steps.micro_batches} "
        f"micro-batches of {train.micro_batch_size}"
    )


def _steps(plan: Plan, line: Callable[[str, str], Text]) -> Iterator[Text]:
    steps, data, train = plan.steps, plan.data, plan.arguments.train
    upper = "" if data is not None else " at most"
    text = f"{many(steps.tokens_per_step)} tokens{upper} a step"
    if steps.steps is not None:
        text = f"{steps.steps:,} x {text}: {many(steps.tokens or 0)} tokens"
    else:
        text = f"{train.num_epochs:g} epochs, {text}; --data counts the steps"
    yield line("steps", text)
    if data is not None:
        epochs = f"; {steps.epochs:.3g} epochs" if steps.epochs is not None else ""
        yield line(
            "data",
            f"{data.sequences:,} sequences, {many(data.tokens)} tokens, the longest {data.longest:,}{epochs}",
        )
    rank = (steps.flops_per_step + steps.recomputed_per_step) / plan.layout.world_size
    again = f" and {_flops(steps.recomputed_per_step)} of recompute" if steps.recomputed_per_step else ""
    yield line(
        "compute",
        f"{_flops(steps.flops_per_step)} a step{again}; {rank / 1e14:.3g} s where a rank does 100 TFLOP/s",
    )


def _stages(plan: Plan) -> Iterator[Text]:
    """A row a stage: its layers at their place in the model."""
    from rich.text import Text

    layout, total = plan.layout, plan.model.architecture.num_layers
    waiting = f", {100 * plan.bubble:.1f} % of a step is waiting" if layout.pipeline > 1 else ""
    if plan.slowest > UNEVEN:
        waiting += f": a stage has {plan.slowest:.2f} x the mean work"
    count = f"{layout.pipeline} stage" + ("s" if layout.pipeline > 1 else "")
    yield Text.assemble(("pipeline  ", "bold"), f"{count}, {total} layers{waiting}")
    if plan.split is not None:
        yield Text(
            f"          {100 * plan.split.bubble:.1f} % with --num_layers_in_first_pipeline_stage {plan.split.first} "
            f"--num_layers_in_last_pipeline_stage {plan.split.last}"
        )
    for stage in range(layout.pipeline):
        bar, names = [" "] * STAGE_BAR, []
        for chunk in layout.of_stage(stage):
            first, last = (edge * STAGE_BAR // total for edge in (chunk.layers.start, chunk.layers.stop))
            bar[first : max(last, first + 1)] = "\u2588" * max(last - first, 1)
            names.append(_layers(chunk))
        yield Text.assemble(f"  stage {stage:<3} ", ("".join(bar[:STAGE_BAR]), "blue"), f" {', '.join(names)}")


def _layers(chunk: Chunk) -> str:
    layers = chunk.layers
    text = "no layers" if not layers else f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ("embedding + " if chunk.embedding else "") + text + (" + output" if chunk.output else "")


def _memory(plan: Plan) -> Iterator[Text]:
    """A bar and a row of numbers a stage."""
    from rich.text import Text

    device = plan.device
    yield Text.assemble(
        ("memory    ", "bold"),
        f"of a rank in GB; {device.usable / GB:.1f} of {device.total / GB:.1f} are usable ({device.source})",
    )
    yield Text.assemble("            ", *((f"{letter} {name}  ", colour) for name, letter, colour in PARTS))
    scale = max(device.usable, plan.peak.total) / MEMORY_BAR
    for stage in plan.stages:
        row = Text(f"  stage {stage.stage:<3} ")
        edge = done = 0
        for name, letter, colour in PARTS:
            done += getattr(stage, name)
            cells = round(done / scale) - edge
            row.append(letter * cells, style=colour)
            edge += cells
        row.append(" " * (MEMORY_BAR - edge))
        over = stage.total > device.usable
        row.append(f" {stage.total / GB:8.2f}", style="bold red" if over else "bold")
        row.append(" too much" if over else "")
        yield row
    heads = (("params", 8), ("trainable", 10), *((name, len(name) + 2) for name, _, _ in PARTS))
    yield Text("  stage " + "".join(f"{name:>{width}}" for name, width in heads), style="dim")
    for stage in plan.stages:
        numbers = (many(stage.parameters), many(stage.trainable))
        cells = [*numbers, *(f"{getattr(stage, name) / GB:.2f}" for name, _, _ in PARTS)]
        line = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, heads, strict=True))
        yield Text(f"  {stage.stage:<6}{line}")


def _verdict(plan: Plan) -> Iterator[Text]:
    from rich.text import Text

    peak, device = plan.peak, plan.device
    if plan.fits:
        left = (device.usable - peak.total) / GB
        yield Text.assemble(("fits      ", "bold green"), f"{left:.1f} GB are left on a rank of stage {peak.stage}")
    else:
        over = (peak.total - device.usable) / GB
        yield Text.assemble(
            ("does not fit: ", "bold red"), f"a rank of stage {peak.stage} needs {over:.1f} GB more than it can use"
        )
        for suggestion in plan.suggestions:
            yield Text.assemble("  ", (suggestion.flags, "bold"), f"   {suggestion.total / GB:.1f} GB")
        if not plan.suggestions:
            ranks = "" if device.kind == "cpu" else "more ranks, "
            yield Text(f"  no change that was tried makes it fit: {ranks}shorter sequences, or a smaller model")
    if device.kind == "cpu":
        yield Text("          a plan for GPUs: --gpu_memory 80GB")


def _arguments(plan: Plan) -> Iterator[Any]:
    """What was set, each with its source; then what is left at its default."""
    from rich.padding import Padding
    from rich.text import Text

    rows = [(name, schema.typed(value), source) for name, value, source in describe(plan.arguments)]
    given = [row for row in rows if row[2] != "default"]
    yield Text.assemble(("arguments ", "bold"), f"{len(given)} of {len(rows)} are set")
    width = max((len(name) for name, _, _ in given), default=0)
    for name, value, source in given:
        yield Text.assemble(f"  {name:<{width}}  {value}", (f"  {source}", "dim"))
    section, words = "", list[str]()
    for name, value, source in [*rows, ("", "", "")]:
        here, _, leaf = name.rpartition(".")
        if here != section:
            if words:
                left = Text.assemble(f"defaults of {section or 'the run'}: ", (", ".join(words), "dim"))
                yield Padding(left, (0, 0, 0, 2))
            section, words = here, []
        if source == "default":
            words.append(f"{leaf} {value}")
    for note in plan.arguments.notes:
        yield Text(f"note: {note}")


def many(number: float) -> str:
    """70.6 B, 8.03 B, 12.5 M, 950"""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _flops(number: float) -> str:
    """56.8 PFLOP, 1.75 TFLOP"""
    return f"{number / 1e15:.3g} PFLOP" if number >= 1e15 else f"{number / 1e12:.3g} TFLOP"
