"""Steps, epochs, tokens and arithmetic of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from primus_bridge.config.arguments import BridgeArguments, ModelArguments
from primus_bridge.config.follow import steps_are_known, steps_of_epochs
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.plan.layout import Chunk, Layout
from primus_bridge.plan.parameters import EMBEDDING, numbers_of_layer, rule_numbers
from primus_bridge.plan.schedule import Work


@dataclass(frozen=True)
class Data:
    """The training set as the run will see it: sequences and real tokens of an epoch, the longest sequence."""

    sequences: int
    tokens: int
    longest: int


@dataclass(frozen=True)
class Steps:
    """steps: None: not known before the data is counted. tokens_per_step: real ones where the data was counted, else
    at most (every sequence as long as seq_length). flops_per_step: the model's, all ranks; recomputed_per_step: what
    activation recompute adds."""

    micro_batches: int
    steps: Optional[int]
    epochs: Optional[float]
    tokens_per_step: float
    flops_per_step: float
    recomputed_per_step: float

    @property
    def tokens(self) -> Optional[float]:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.tokens_per_step


def count_steps(
    arguments: BridgeArguments, layout: Layout, data: Optional[Data], forward: Forward, length: float
) -> Steps:
    """What a step and the run take. data: None: not counted. forward: of sequences of ``length`` tokens."""
    train, full = arguments.train, arguments.peft.scheme is None
    steps: Optional[int] = train.train_iters if steps_are_known(arguments) else None
    if data is not None and train.num_epochs is not None and steps is None:
        steps = steps_of_epochs(train.num_epochs, data.sequences, train.global_batch_size)
    epochs = train.num_epochs if steps is None else None
    if data is not None and steps is not None:
        epochs = steps * train.global_batch_size / data.sequences
    tokens = train.global_batch_size * length
    return Steps(
        micro_batches=train.global_batch_size // (train.micro_batch_size * layout.data),
        steps=steps,
        epochs=epochs,
        tokens_per_step=tokens,
        flops_per_step=tokens * forward.with_backward(full),
        recomputed_per_step=tokens * sum(forward.again(arguments.model, chunk) for chunk in layout.chunks),
    )


@dataclass(frozen=True)
class Forward:
    """Multiplications and additions of the forward pass for a token: of the products with each layer's weights, of each
    layer's attention, and of the output layer. Of a product with weights 2 a number; of the attention, whose query sees
    half the sequence on average, 2 a number of query and 2 of value.

    Source: Kaplan et al. 2020, section 2.1; Narayanan et al. 2021, appendix.
    """

    weights: tuple[float, ...]
    attention: tuple[float, ...]
    output: float

    @classmethod
    def of(cls, family: Family, arch: Architecture, length: float) -> Forward:
        """length: tokens of a sequence."""
        products = [
            rule
            for rule in family.rules
            if not rule.megatron.startswith(EMBEDDING)
            and all(len(shape) > 1 for shape in rule.hf_tensors(arch).values())
        ]
        of_layers = [rule for rule in products if "{layer}" in rule.megatron]
        # a tied output layer multiplies with the embedding's weight
        output = sum(rule_numbers(rule, arch) for rule in products if rule not in of_layers)
        output += arch.vocab_size * arch.hidden_size if arch.tied_embeddings else 0
        layers = range(arch.num_layers)
        weights = (2 * sum(numbers_of_layer(rule, arch, layer, True) for rule in of_layers) for layer in layers)
        return cls(tuple(weights), tuple(_attention(arch, layer, length) for layer in layers), 2 * output)

    def with_backward(self, full: bool) -> float:
        """Both passes of the whole model."""
        return sum(_passes(sum(self.weights) + self.output, sum(self.attention), full))

    def again(self, model: ModelArguments, chunk: Chunk) -> float:
        """What activation recompute does a second time of a part of the model."""
        if model.recompute_granularity is None:
            return 0.0
        if model.recompute_granularity == "selective":
            return self._of(self.attention, chunk.layers)
        number = (model.recompute_num_layers or 1) if model.recompute_method == "block" else None
        layers = chunk.layers[:number]
        return self._of(self.weights, layers) + self._of(self.attention, layers)

    def work(self, arguments: BridgeArguments, chunk: Chunk) -> Work:
        """What a rank does of a part of the model for a token: recompute is in the backward pass."""
        weights = self._of(self.weights, chunk.layers) + (self.output if chunk.output else 0.0)
        once = _passes(weights, self._of(self.attention, chunk.layers), arguments.peft.scheme is None)
        return once._replace(backward=once.backward + self.again(arguments.model, chunk))

    @staticmethod
    def _of(each: tuple[float, ...], layers: range) -> float:
        return sum(each[layers.start : layers.stop])


def _passes(weights: float, attention: float, full: bool) -> Work:
    """Backward, the gradient of a product's input takes as much again, with ``full`` that of its weight too."""
    return Work(weights + attention, (2 if full else 1) * weights + 2 * attention)


def _attention(arch: Architecture, layer: int, length: float) -> float:
    seen = min(arch.window(layer) or length, length)
    return 2 * (arch.q_size + arch.attention_size) * (seen - seen * seen / (2 * length))
