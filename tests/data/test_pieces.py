"""The texts of tokens, joined, are what the tokenizer decodes, for tokenizers of every kind."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from primus_bridge.data.pieces import token_pieces
from tests.cli.example import save_tokenizer
from tests.data import families

TEXTS = {
    "plain": "The sum is seven.\n\n  two  spaces ",
    "other scripts": "日本語 🙂👩‍👩‍👧 Привет مرحبا é",
    "controls": "a\r\nb\tc\x1b[31m\x00\x7f",
    "replacement characters": "x\ufffdy\ufffd\ufffd\ufffd\ufffd\ufffdz\ufffd",
    "long": "the answer is five 🙂 " * 200,
    "empty": "",
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, PreTrainedTokenizerFast]:
    words = tmp_path_factory.mktemp("word_level")
    save_tokenizer(words)
    sentencepiece = families.sentencepiece_folder(tmp_path_factory.mktemp("sentencepiece"))
    return {
        "byte level": families.qwen(),
        "byte level with BOS": families.llama3(),
        "byte fallback": families.llama2(),
        "byte fallback, legacy": families.llama2(True),
        "sentencepiece": AutoTokenizer.from_pretrained(sentencepiece),
        "words": AutoTokenizer.from_pretrained(words),
    }


@pytest.mark.parametrize("kind", ["byte level", "byte level with BOS", "byte fallback", "byte fallback, legacy"])
@pytest.mark.parametrize("text", TEXTS)
def test_joined_is_decoded(tokenizers, kind, text):
    _check(tokenizers[kind], tokenizers[kind](TEXTS[text]).input_ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "words"])
def test_joined_is_decoded_by_other_tokenizers(tokenizers, kind):
    for text in TEXTS.values():
        _check(tokenizers[kind], tokenizers[kind](text).input_ids)
    _check(tokenizers[kind], tokenizers[kind]("say 12 and 13").input_ids)


def _check(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def test_a_character_is_its_last_token_s(tokenizers):
    tokenizer = tokenizers["byte level"]
    ids = tokenizer("a🙂b").input_ids
    assert token_pieces(tokenizer, ids) == ["a", "", "", "", "🙂", "b"]


def test_special_tokens_have_their_text(tokenizers):
    tokenizer = tokenizers["byte level"]
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids
    pieces = token_pieces(tokenizer, ids)
    assert (pieces[0], pieces[-1]) == ("<|im_start|>", "<|im_end|>")


def test_a_character_cut_in_the_middle_is_shown_as_broken(tokenizers):
    tokenizer = tokenizers["byte level"]
    ids = tokenizer("a🙂").input_ids[:-1]
    assert token_pieces(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_numpy_ids(tokenizers):
    import numpy as np

    tokenizer = tokenizers["byte level"]
    ids = tokenizer("five 🙂").input_ids
    assert token_pieces(tokenizer, np.array(ids, dtype=np.int32)) == token_pieces(tokenizer, ids)


def test_broken_bytes_do_not_undo_what_stands(tokenizers):
    """A byte-fallback decoder answers one broken character with a whole run of U+FFFD."""
    tokenizer = tokenizers["byte fallback"]
    ids = tokenizer("日本").input_ids
    assert "".join(token_pieces(tokenizer, ids[:-1])) == "<s> 日\ufffd\ufffd"
    joined = "".join(token_pieces(tokenizer, ids[:-1] + tokenizer("five", add_special_tokens=False).input_ids))
    assert joined.startswith("<s> 日\ufffd\ufffd") and joined.endswith("five")
    long = "日本語" * 50
    assert "".join(token_pieces(tokenizer, tokenizer(long).input_ids)) == f"<s> {long}"
