"""A conversation to ids and loss weights, and back to the text that is supervised."""

from __future__ import annotations

import numpy as np

from primus_bridge.config.arguments import DatasetArguments
from primus_bridge.data.messages import Conversation, Message
from primus_bridge.data.templates import Rendered, choose_template
from primus_bridge.data.tokenize import Encoder


def template_of(tokenizer, name: str, data_format: str = "messages", **options):
    return choose_template(DatasetArguments(prompt_template=name, **options), data_format, tokenizer)


def conversation_of(messages) -> Conversation:
    return messages if isinstance(messages, Conversation) else Conversation(list(messages))


def render(tokenizer, messages, name: str, **options) -> Rendered:
    return template_of(tokenizer, name, **options).render(conversation_of(messages))


def encode(tokenizer, messages: list[Message] | Conversation, name: str, **options) -> tuple[list[int], np.ndarray]:
    """(ids, loss weights) of a conversation under a template."""
    template = template_of(tokenizer, name, **options)
    encoder = Encoder(tokenizer, template.control_tokens())
    [(ids, weights)] = encoder.encode_rendered([template.render(conversation_of(messages))])
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights)
    return ids.tolist(), weights


def decode(tokenizer, ids) -> str:
    # the space that SentencePiece's decoder strips at the start of a text is put back by a first token
    first = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    return tokenizer.decode([first, *ids], skip_special_tokens=False).removeprefix(tokenizer.eos_token)


def supervised_text(tokenizer, ids, weights) -> str:
    return decode(tokenizer, [token for token, weight in zip(ids, weights, strict=True) if weight])
