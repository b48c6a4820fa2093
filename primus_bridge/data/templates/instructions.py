"""Templates of headed sections: Alpaca's and Dolly's instruction, input and response, SQuAD's, Llama 2's [INST]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from primus_bridge.data.messages import Conversation
from primus_bridge.data.templates.base import Piece
from primus_bridge.data.templates.own import OwnTemplate, alternating, answer, end, prompt, said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Alpaca(OwnTemplate):
    """stanford_alpaca's prompt; target = output + EOS. Source: github.com/tatsu-lab/stanford_alpaca, PROMPT_DICT.

    A system message stands in place of the preamble. Several turns (alpaca's history): the preamble once, then an
    Instruction/Input/Response block a turn, each answer ended by EOS and separated by a blank line.
    """

    name = "alpaca"
    plain = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    input_header = "### Input:"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, response_newline: bool = True):
        super().__init__(tokenizer)
        self.response = "\n\n### Response:" + ("\n" if response_newline else "")

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        system, turns = alternating(conversation.messages, self.name)
        if system:
            pieces = [said(system, 0), prompt("\n\n", 0)]
        else:
            pieces = [prompt((self.with_input if any(turn.context for _, turn in turns) else self.plain) + "\n\n")]
        first = turns[0][0]
        for i, message in turns:
            if message.role == "assistant":
                pieces += [prompt(self.response, i), answer(message.content, i), end(self._stop(), i)]
                continue
            pieces += [prompt(("\n\n" if i > first else "") + "### Instruction:\n", i), said(message.content, i)]
            if message.context:
                pieces += [prompt(f"\n\n{self.input_header}\n", i), said(message.context, i)]
        return pieces

    def _stop(self) -> str:
        return self._eos()


class Dolly(Alpaca):
    """Dolly's prompt: Alpaca's with ``Input:`` for the context, and ``### End`` after the answer.

    Where the tokenizer has no token ``### End`` (Dolly's own has), EOS follows it, so that generation stops.
    Source: github.com/databrickslabs/dolly, training/consts.py.
    """

    name = "dolly"
    with_input = Alpaca.plain
    input_header = "Input:"

    def control_tokens(self) -> tuple[str, ...]:
        return ("### End", "### Instruction:", "### Response:\n")

    def _stop(self) -> str:
        known = "### End" in self.tokenizer.get_added_vocab()
        return "\n\n### End" + ("" if known else self._eos())


class Squad(OwnTemplate):
    """``Context: {context} Question: {question} Answer: {answer}`` EOS on one line; the last space is learnt.

    The text that Megatron-Bridge's recipes train on. Source: megatron/bridge/data/hf_processors/squad.py.
    """

    name = "squad"

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        system, turns = alternating(conversation.messages, self.name)
        pieces = [said(system, 0), prompt(" ", 0)] if system else []
        for i, message in turns:
            if message.role == "assistant":
                pieces += [prompt(" Answer:", i), end(" ", i), answer(message.text.strip(" "), i), end(self._eos(), i)]
                continue
            if message.context:
                pieces += [prompt("Context: ", i), said(message.context.strip(" "), i), prompt(" ", i)]
            pieces += [prompt("Question: ", i), said(message.content.strip(" "), i)]
        return pieces


class Llama2(OwnTemplate):
    """BOS ``[INST] {user} [/INST] {answer} `` EOS a pair, contents stripped, the system in the first user turn.

    The spaces around the answer are targets: the model writes the first with its first word, and the second before
    EOS. Source: github.com/meta-llama/llama, llama/generation.py chat_completion.
    """

    name = "llama2"

    def warnings(self) -> list[str]:
        return [] if self._bos() else ["template 'llama2': the tokenizer has no bos_token; turns start without one"]

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        system, turns = alternating(conversation.messages, self.name)
        pieces: list[Piece] = []
        eos = self._eos()
        for i, message in turns:
            if message.role == "assistant":
                pieces += [end(" ", i), answer(message.text.strip(), i), end(" " + eos, i)]
                continue
            pieces.append(prompt(self._bos() + "[INST] ", i))
            if system and i == 1:
                pieces += [prompt("<<SYS>>\n", 0), said(system, 0), prompt("\n<</SYS>>\n\n", 0)]
                pieces.append(said(message.text.rstrip(), i))
            else:
                pieces.append(said(message.text.strip(), i))
            pieces.append(prompt(" [/INST]", i))
        return pieces

    def _prepends_bos(self) -> bool:
        return False
