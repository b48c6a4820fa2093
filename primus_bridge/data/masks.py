"""Loss weights: how much each piece of a rendered conversation counts, from spans and options, never from text."""

from __future__ import annotations

from primus_bridge.data.messages import Conversation
from primus_bridge.data.templates.base import Rendered


def piece_weights(
    rendered: Rendered, conversation: Conversation, loss_on: str = "assistant", prompt_loss_weight: float = 0.0
) -> list[float]:
    """The loss weight of each piece.

    A message's own weight counts first: for an assistant's on what the model writes, for another's from its content to
    the end of its turn. Else by ``loss_on`` (assistant, last_turn, all): every answer, the last one, or the whole text
    weighs 1. The rest weighs prompt_loss_weight.
    """
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    own = {i: message.weight for i, message in enumerate(messages) if message.weight is not None}
    out: list[float] = []
    begun = set()  # turns of others whose content has begun
    for piece in rendered.pieces:
        if not piece.literal and not piece.supervised:
            begun.add(piece.turn)
        if piece.turn in own and (piece.supervised or piece.turn in begun):
            out.append(float(own[piece.turn]))
        elif loss_on == "all" or (piece.supervised and (loss_on == "assistant" or piece.turn == last)):
            out.append(1.0)
        else:
            out.append(prompt_loss_weight)
    return out
