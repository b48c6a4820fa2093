"""Chat templates as the model families publish them (tokenizer_config.json), and tokenizers of their kind trained here."""

# ruff: noqa: E501
from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def _published(name: str) -> str:
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = _published("llama3")
LLAMA31_DATE = _published("llama3_2")
QWEN25 = _published("qwen2_5")
QWEN3 = _published("qwen3")
ZEPHYR = _published("zephyr")
UNENDED = "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}{% endfor %}"

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nAdd the numbers.\n\n### Input:\n3 and 4\n\n### Response:\nThe sum is seven.",
    "[INST] <<SYS>>\nBe kind and brief.\n<</SYS>>\n\nHello there, how are you? [/INST] I am well, thank you. ",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis is the capital.<|im_end|>",
    "the answer is five, the answer is six, and the rest is silence\n\nsystem user assistant\n",
    "def f(x):\n    return x + 1\n\n\nprint(f(2))  # three",
] * 3

DEEPSEEK_MARKS = [f"<｜{name}｜>" for name in ("User", "Assistant", "tool▁sep")]
DEEPSEEK_MARKS += [
    f"<｜tool▁{name}▁{side}｜>" for name in ("calls", "call", "outputs", "output") for side in ("begin", "end")
]

# the pre-tokenisation of Llama 3 and Qwen
SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(special: list[str], added: list[str] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500 + len(special),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(list(added))  # not special, as Qwen3's <think>
    return tokenizer


@lru_cache
def qwen(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE, no BOS, ends turns with <|im_end|>; <think> are added tokens that are not special."""
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def llama3(template: str | None = LLAMA3) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <|begin_of_text|> before a text."""
    backend = _byte_level(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def phi3(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Phi-3's markers, no BOS, EOS <|endoftext|> after the whole conversation."""
    backend = _byte_level(["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def gemma(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Gemma's markers, and its BOS before a text."""
    return _with_bos("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), template)


@lru_cache
def deepseek(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with DeepSeek's markers and tool tokens, and its BOS before a text."""
    return _with_bos("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", DEEPSEEK_MARKS, template)


@lru_cache
def deepseek_added(template: str | None = None) -> PreTrainedTokenizerFast:
    """The same, with markers that are added tokens but not special."""
    return _with_bos("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", (), template, DEEPSEEK_MARKS)


def _with_bos(bos: str, eos: str, marks, template: str | None, added=()) -> PreTrainedTokenizerFast:
    backend = _byte_level([bos, eos, *marks], added)
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def dolly() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Dolly's own end token."""
    backend = _byte_level(["<|endoftext|>", "### End", "### Instruction:", "### Response:\n"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


@lru_cache
def llama2(legacy: bool = False, template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback. legacy: a space is put before every text between special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", "<s>", "</s>"]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    # words are learned apart, as SentencePiece does; the finished tokenizer merges within whole texts
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    corpus = [text.replace("\n", " ") for text in CORPUS]
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    backend = Tokenizer.from_str(_plain_byte_tokens(tokenizer.to_str(), special))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    out.chat_template = template
    return out


def _plain_byte_tokens(specification: str, special: list[str]) -> str:
    """Byte tokens belong to the vocabulary but are not added tokens, as in Llama 2's tokenizer.json."""
    import json

    values = json.loads(specification)
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in special]
    values["pre_tokenizer"] = None
    return json.dumps(values)


# of a folder with tokenizer.model
LLAMA_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}


def sentencepiece_folder(folder: Path) -> Path:
    """A folder with tokenizer.model, trained by sentencepiece itself, and Llama's tokenizer_config.json."""
    import json

    import sentencepiece

    (folder / "corpus.txt").write_text("\n".join(line for text in CORPUS for line in text.splitlines() if line))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    (folder / "corpus.txt").unlink()
    config = LLAMA_TOKENIZER | {
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": LLAMA2,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
