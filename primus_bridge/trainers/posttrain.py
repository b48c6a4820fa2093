"""SFTTrainer: supervised fine-tuning, full or LoRA: loss on the assistant's tokens and their end-of-turn."""

from __future__ import annotations

from primus_bridge.trainers.base import BaseTrainer


class SFTTrainer(BaseTrainer):
    """Instruction data through a prompt template; everything else is the base's."""

    stage = "sft"
