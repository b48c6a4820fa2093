"""Steps, epochs, tokens and arithmetic of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.follow import steps_are_known, steps_of_epochs
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.parameters import EMBEDDING, rule_numbers


@dataclass(frozen=True)
class Data:
    """The training set as the run will see it: sequences and real tokens of an epoch, the longest sequence."""

    sequences: int
    tokens: int
    longest: int


@dataclass(frozen=True)
class Steps:
    """steps: None: not known before the data is counted. tokens_per_step: real ones where the data was counted, else
    at most (every sequence as long as seq_length). flops_per_step: the model's, all ranks; nothing that is done
    twice."""

    micro_batches: int
    steps: Optional[int]
    epochs: Optional[float]
    tokens_per_step: float
    flops_per_step: float

    @property
    def tokens(self) -> Optional[float]:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.tokens_per_step


def count_steps(
    arguments: BridgeArguments, family: Family, arch: Architecture, layout: Layout, data: Optional[Data]
) -> Steps:
    """What a step and the run take. data: None: not counted."""
    train, full = arguments.train, arguments.peft.scheme is None
    steps: Optional[int] = train.train_iters if steps_are_known(arguments) else None
    if data is not None and train.num_epochs is not None and steps is None:
        steps = steps_of_epochs(train.num_epochs, data.sequences, train.global_batch_size)
    length = data.tokens / data.sequences if data is not None else arguments.model.seq_length
    epochs = train.num_epochs if steps is None else None
    if data is not None and steps is not None:
        epochs = steps * train.global_batch_size / data.sequences
    tokens = train.global_batch_size * length
    return Steps(
        micro_batches=train.global_batch_size // (train.micro_batch_size * layout.data),
        steps=steps,
        epochs=epochs,
        tokens_per_step=tokens,
        flops_per_step=tokens * flops_per_token(family, arch, length, full),
    )


def flops_per_token(family: Family, arch: Architecture, length: float, full: bool) -> float:
    """Multiplications and additions of forward and backward pass for a token of a sequence.

    Of the weights 2 each forward, 2 for the gradient of the input, and with ``full`` 2 for that of the weight; of the
    attention, whose query sees half the sequence on average, 4 a number of query and value forward, 8 backward.
    Source: Kaplan et al. 2020, section 2.1; Narayanan et al. 2021, appendix.
    """
    products = [
        rule
        for rule in family.rules
        if not rule.megatron.startswith(EMBEDDING) and all(len(shape) > 1 for shape in rule.hf_tensors(arch).values())
    ]
    weights = sum(rule_numbers(rule, arch, active_only=True) for rule in products)
    if arch.tied_embeddings:
        weights += arch.vocab_size * arch.hidden_size  # the output layer's product
    attention = 0.0
    for layer in range(arch.num_layers):
        seen = min(arch.window(layer) or length, length)
        attention += arch.num_attention_heads * arch.kv_channels * (seen - seen * seen / (2 * length))
    return (6 if full else 4) * weights + 12 * attention
