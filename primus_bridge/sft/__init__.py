"""The Python API: SFTConfig says what to train, SFTTrainer trains it, with the trainers of primus train."""

from primus_bridge.sft.config import SFTConfig
from primus_bridge.sft.trainer import SFTTrainer

__all__ = ["SFTConfig", "SFTTrainer"]
