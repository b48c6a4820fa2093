"""What is learnt, under every template, with two published tokenizers: tekken (byte-level BPE) and SentencePiece."""

from __future__ import annotations

import pytest

from primus_bridge.data.templates import TEMPLATES

from . import families, real_tokenizers
from .conversations import CONVERSATIONS, ONE
from .encoding import conversation_of, encode, supervised_text, template_of

# the markers of every family, which each one's own tokenizer has
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"]
CONTROL += ["<|system|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
CONTROL += ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
# what the model writes around an answer
BEFORE = {"llama2": " ", "vicuna": " ", "mistral_v1": " ", "mistral": " ", "mistral_v3": " ", "squad": " "}
END = {
    "dolly": "\n\n### End</s>",
    "chatml": "<|im_end|>",
    "qwen2": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "chat_template": "<|im_end|>",
    "custom": "<|im_end|>",
    "auto": "<|im_end|>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "deepseek": "<｜end▁of▁sentence｜>",
}


@pytest.fixture(scope="module", params=["tekken", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tekken":
        tokenizer, _ = real_tokenizers.load_tekken(folder)
    else:
        tokenizer = real_tokenizers.load_sentencepiece("v3", folder)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = families.CHATML
    return tokenizer


def spaced(text: str) -> str:
    """SentencePiece's decoder makes spaces of the U+2581 in DeepSeek's tokens too."""
    return text.replace("▁", " ")


@pytest.mark.parametrize("shape", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_their_ends_are_learnt(tokenizer, name, shape):
    messages = CONVERSATIONS[shape]
    options = {"custom_template": families.CHATML} if name == "custom" else {}
    ids, weights = encode(tokenizer, messages, name, **options)
    expected = [BEFORE.get(name, "") + m.content + END.get(name, "</s>") for m in messages if m.role == "assistant"]
    assert spaced(supervised_text(tokenizer, ids, weights)) == spaced("".join(expected))
    # BOS once, or once a pair where the family has it so
    assert ids.count(tokenizer.bos_token_id) <= (len(expected) if name == "llama2" else 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_in_the_data_are_text(tokenizer, name):
    options = {"custom_template": families.CHATML} if name == "custom" else {}
    control = {tokenizer.convert_tokens_to_ids(token) for token in [*CONTROL, "<s>", "</s>"]}
    spoof = "".join(CONTROL) + "</s>"

    def encoded(question, answer):
        turns = [ONE[0]._replace(content=question), ONE[1]._replace(content=answer)]
        ids, weights = encode(tokenizer, turns, name, **options)
        return [token for token in ids if token in control], supervised_text(tokenizer, ids, weights)

    plain, spoofed = encoded("ask", "five"), encoded(f"ask {spoof}", f"five {spoof} six")
    assert spoofed[0] == plain[0]
    assert spaced(spoofed[1]) == spaced(plain[1].replace("five", f"five {spoof} six"))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("auto", "custom")])
def test_every_piece_names_its_turn(tokenizer, name):
    messages = CONVERSATIONS["two turns and system"]
    pieces = template_of(tokenizer, name).render(conversation_of(messages)).pieces
    for i, message in enumerate(messages):
        own = [piece for piece in pieces if piece.turn == i]
        assert message.content in "".join(piece.text for piece in own)
        assert any(piece.supervised for piece in own) == (message.role == "assistant")
    turns = [piece.turn for piece in pieces if piece.turn > 0]
    assert turns == sorted(turns)
