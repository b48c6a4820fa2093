"""The published tokenizers in mistral-common's package, as Hugging Face fast tokenizers: SentencePiece and tekken."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .families import LLAMA_TOKENIZER

DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
TEKKEN_WORDS = 20_000  # of 130 000: the others only make loading slow


def load_sentencepiece(version: str, folder: Path, *, legacy: bool = False) -> PreTrainedTokenizerFast:
    """legacy: the tokenizer puts a space before every text that follows a special token."""
    (folder / "tokenizer.model").write_bytes((DATA / SENTENCEPIECE[version]).read_bytes())
    config = LLAMA_TOKENIZER | {"legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


@lru_cache
def mistral_sentencepiece(version: str) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(DATA / SENTENCEPIECE[version]), mode=ValidationMode.finetuning)


def load_tekken(folder: Path) -> tuple[PreTrainedTokenizerFast, MistralTokenizer]:
    """The most frequent tokens of the published tekken (Mistral Nemo's), by transformers and by mistral-common."""
    tekken = json.loads((DATA / "tekken_240718.json").read_text())
    tekken["vocab"] = tekken["vocab"][:TEKKEN_WORDS]
    special = tekken["config"]["default_num_special_tokens"]
    tekken["config"] |= {"default_vocab_size": TEKKEN_WORDS + special, "num_vocab_tokens": TEKKEN_WORDS}
    (folder / "tekken.json").write_text(json.dumps(tekken))
    tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer, MistralTokenizer.from_file(str(folder / "tekken.json"), mode=ValidationMode.finetuning)
