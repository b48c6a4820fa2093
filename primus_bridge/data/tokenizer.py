"""The tokenizer of a run: a fast Hugging Face tokenizer, loaded without ever running code from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from primus_bridge.errors import ConfigError
from primus_bridge.files import looks_like_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# any of these makes a folder a tokenizer folder; transformers 5 would otherwise build an untrained one in silence
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, or of a hub id. Code that comes with it is never executed.

    Raises ConfigError when the folder does not exist or holds no tokenizer, or only one without a fast version.
    """
    import transformers
    from transformers import AutoTokenizer

    # where mistral-common is installed, transformers 5 prefers it to a tokenizer.json; its backend has no fast version
    options = {"mistral_format": False} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    name = str(path_or_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise ConfigError(
                "the folder holds no tokenizer (looked for " + ", ".join(TOKENIZER_FILES) + "); copy the model's "
                "tokenizer files there, or name another folder as tokenizer.tokenizer_model",
                where=str(folder),
            )
        name = str(folder)
    elif folder.exists():
        raise ConfigError(
            "tokenizer.tokenizer_model must be a folder or a hub id, this is a file; name the folder that holds it",
            where=name,
        )
    elif looks_like_path(name):
        raise ConfigError(
            "no such folder; tokenizer.tokenizer_model (or hf_model_name_or_path) must name a folder "
            "with a tokenizer, or a hub id such as 'Qwen/Qwen2.5-0.5B'",
            where=name,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, use_fast=True, **options)
    except Exception as error:  # transformers raises a dozen unrelated types for a broken or absent tokenizer
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot load a tokenizer: {first}", where=name) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no fast version; save a tokenizer.json beside it "
            "(transformers: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained)",
            where=name,
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def pad_token_id(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> int:
    """The id that fills masked positions: the pad token, else EOS, else 0. It is never a target.

    A pad token beyond the model's vocabulary (one that was added later) has no embedding, and is passed over.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id < vocab_size:
            return int(token_id)
    return 0


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself puts BOS before a text (Llama does, Qwen and GPT-2 do not)."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]


def control_tokens(tokenizer: PreTrainedTokenizerFast, also: Sequence[str] = ()) -> list[str]:
    """The added tokens that must never be read in user text: the special ones, BOS, EOS, and ``also`` where known."""
    known = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    asked = {*also, tokenizer.bos_token, tokenizer.eos_token}
    return [token for token, special in known.items() if token and (special or token in asked)]
