"""Loss weights by option and by message, checked as text: what is supervised, with which weight."""

from __future__ import annotations

import numpy as np
import pytest

from primus_bridge.data.masks import piece_weights
from primus_bridge.data.messages import Conversation, Message
from primus_bridge.data.tokenize import Encoder

from . import families
from .encoding import decode, render, template_of

TURNS = [
    Message("system", "Be kind and brief."),
    Message("user", "What is 三 😀?"),
    Message("assistant", "the answer is three"),
    Message("user", "And five?"),
    Message("assistant", "the answer is <|im_end|> five"),
]
TOKENIZERS = {"byte-level": families.qwen, "sentencepiece": families.llama2}


def weighed(tokenizer, messages, loss_on="assistant", prompt_loss_weight=0.0, template="chatml"):
    """(ids, weights, text by weight: {weight: decoded tokens of it})"""
    conversation = Conversation(list(messages))
    chosen = template_of(tokenizer, template)
    rendered = chosen.render(conversation)
    weights = piece_weights(rendered, conversation, loss_on, prompt_loss_weight)
    [(ids, values)] = Encoder(tokenizer, chosen.control_tokens()).encode_rendered([rendered], [weights])
    by_weight = {float(w): decode(tokenizer, ids[values == w]) for w in np.unique(values)}
    return ids, values, by_weight


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_every_answer_with_its_end_of_turn(tokenizer):
    _, _, text = weighed(tokenizer, TURNS)
    assert text[1.0] == "the answer is three<|im_end|>the answer is <|im_end|> five<|im_end|>"


def test_the_last_turn_only(tokenizer):
    _, _, text = weighed(tokenizer, TURNS, "last_turn")
    assert text[1.0] == "the answer is <|im_end|> five<|im_end|>"


def test_the_whole_text(tokenizer):
    ids, values, _ = weighed(tokenizer, TURNS, "all")
    assert values[0] == 0 and (values[1:] == 1).all()
    assert ids.tolist() == weighed(tokenizer, TURNS)[0].tolist()  # what is supervised changes no token


def test_the_prompt_with_a_weight(tokenizer):
    ids, values, text = weighed(tokenizer, TURNS, prompt_loss_weight=0.25)
    assert text[1.0] == "the answer is three<|im_end|>the answer is <|im_end|> five<|im_end|>"
    assert set(np.unique(values)) == {np.float32(0), np.float32(0.25), np.float32(1)}
    assert (values == 0).sum() == 1  # the first token, which nothing predicts
    with_last = weighed(tokenizer, TURNS, "last_turn", prompt_loss_weight=0.25)[2]
    assert with_last[1.0] == "the answer is <|im_end|> five<|im_end|>" and "three" in with_last[0.25]


def test_weights_of_messages(tokenizer):
    messages = list(TURNS)
    messages[2] = messages[2]._replace(weight=0.0)
    messages[3] = messages[3]._replace(weight=0.125)
    messages[4] = messages[4]._replace(weight=2.5)
    ids, _, text = weighed(tokenizer, messages)
    assert text[2.5] == "the answer is <|im_end|> five<|im_end|>"
    assert 1.0 not in text and "three" in text[0.0]
    # the user's words, to the end of the turn; the header before them stays a prompt
    assert text[0.125].startswith("And five?") and "user" not in text[0.125]
    assert ids.tolist() == weighed(tokenizer, TURNS)[0].tolist()


def test_a_message_of_weight_zero_counts_in_no_option(tokenizer):
    messages = [message._replace(weight=0.0) if message.role == "assistant" else message for message in TURNS]
    for loss_on in ("assistant", "last_turn"):
        assert not weighed(tokenizer, messages, loss_on)[1].any()


def test_trace_gives_every_token_its_message(tokenizer):
    conversation = Conversation(TURNS)
    template = template_of(tokenizer, "chatml")
    rendered, encoder = template.render(conversation), Encoder(tokenizer, template.control_tokens())
    ids, places = encoder.trace(rendered)
    [(plain, _)] = encoder.encode_rendered([rendered])
    assert ids.tolist() == plain.tolist() and len(places) == len(ids)
    for turn, message in enumerate(TURNS):
        mine = [i for i, place in zip(ids, places, strict=True) if place >= 0 and rendered.pieces[place].turn == turn]
        assert message.content in decode(tokenizer, mine)
        others = [other.content for j, other in enumerate(TURNS) if j != turn]
        assert not any(other in decode(tokenizer, mine) for other in others)


@pytest.mark.parametrize("legacy", [False, True])
def test_trace_with_prefix_spaces_and_anchors(legacy):
    tokenizer = families.llama2(legacy)
    messages = [Message("system", "Be kind."), Message("user", "a b"), Message("assistant", "c d")] + TURNS[1:]
    template = template_of(tokenizer, "llama2")
    rendered, encoder = render(tokenizer, messages, "llama2"), Encoder(tokenizer, template.control_tokens())
    ids, places = encoder.trace(rendered)
    [(plain, _)] = encoder.encode_rendered([rendered])
    assert ids.tolist() == plain.tolist()
    for index, piece in enumerate(rendered.pieces):
        if not piece.literal:
            # its first word may begin with the space of the piece before it
            assert piece.text.strip() in decode(tokenizer, ids[(places == index) | (places == index - 1)])
