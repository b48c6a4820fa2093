"""The quickstart's model: a tiny random Llama in Hugging Face format, and a tokenizer trained on the data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from primus_bridge.quickstart.data import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 768

SHAPE: dict[str, Any] = dict(
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=128,
)
# prompts have some twenty tokens: a small base turns every pair of dimensions within them
ROPE_THETA = 20.0

# digits and lone capital letters are tokens of their own, wherever they stand: the skills are about them. The text
# between is cut at line ends only, so that what every prompt repeats (the template, an instruction's wording) costs a
# token or two
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
    from primus_bridge.data.templates.instructions import Alpaca

    if not context:
        return f"{Alpaca.plain}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    return f"{Alpaca.with_input}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def build(folder: Path, questions: Iterable[Question], seed: int) -> int:
    """Write config, random weights and tokenizer into ``folder``; returns the number of parameters."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(questions)
    special: dict[str, Any] = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    # rope_theta by its name of transformers 4, which 5 puts into rope_parameters
    shape = {**SHAPE, "rope_theta": ROPE_THETA}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **shape, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _initialize(model)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def _initialize(model) -> None:
    """Random weights at the scale of this small width; transformers' 0.02 is meant for widths of thousands.

    Embeddings outweigh what the first layers add, and projections into the residual stream shrink with depth, so that
    tokens stay visible to all layers from the first step on. Takes a third of the steps off.
    """
    from torch import nn

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = 0.5 if "embed_tokens" in name else 0.06
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * model.config.num_hidden_layers) ** 0.5
        nn.init.normal_(parameter, std=std)
