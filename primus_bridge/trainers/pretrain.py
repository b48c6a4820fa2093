"""PretrainTrainer: next-token loss over plain text, from random or given weights."""

from __future__ import annotations

from primus_bridge.trainers.base import BaseTrainer


class PretrainTrainer(BaseTrainer):
    """Rows with a ``text`` column, joined and cut to blocks; everything else is the base's."""

    stage = "pretrain"
