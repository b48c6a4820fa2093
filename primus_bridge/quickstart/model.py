"""The quickstart's model: a tiny random Llama in Hugging Face format, with a tokenizer trained on the quickstart's data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.quickstart.data import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 768

SHAPE = dict(
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)

# digits and lone capital letters are tokens of their own, wherever they stand: the skills are about them. The text between
# is cut at line ends only, so that what every prompt repeats (the template, an instruction's wording) costs a token or two
PRETOKENS = r"[0-9]|[A-Z](?![a-z])|\n*(?:[^0-9A-Z\n]|[A-Z](?=[a-z]))+\n?|\n+"


def train_tokenizer(questions: Iterable[Question]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most VOCAB_SIZE tokens, trained on the questions as the alpaca template writes them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # prompt and answer apart, as training cuts them
    texts = (text for q in questions for text in (prompt(q.instruction, q.input), q.output))
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def prompt(instruction: str, context: str = "") -> str:
    """The text before the answer, as prompt_template alpaca writes it."""
    from primus_bridge.data.templates import Alpaca

    if not context:
        return f"{Alpaca.plain}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    return f"{Alpaca.with_input}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def build(folder: Path, questions: Iterable[Question], seed: int) -> int:
    """Write config, random weights and tokenizer into ``folder``; returns the number of parameters."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(questions)
    special = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SHAPE, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()
