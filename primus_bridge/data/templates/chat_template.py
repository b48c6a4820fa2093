"""A Jinja chat template, the tokenizer's or a custom one: rendered whole, and each turn found in the rendered text."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from primus_bridge.data.messages import Conversation, Message, RowError
from primus_bridge.data.templates import marks
from primus_bridge.data.templates.base import Piece, Rendered
from primus_bridge.data.templates.marks import Printed
from primus_bridge.data.templates.own import to_json
from primus_bridge.data.tokenizer import control_tokens
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# an end-of-turn marker that the tokenizer does not know as a token
TEXT_END = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|</s>|<eos>|<end_of_turn>")

# Llama 3 templates print today's date; a run must give the same tokens tomorrow. This is their own default.
FIXED_DATE = datetime.datetime(2024, 7, 26)
DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

SPACE = re.compile(r"\s*")
OPENING_TAG = re.compile(r"(?:<think(?:ing)?>|\[THINK\])\s*\Z")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# transformers caches a compiled template with one tracker of its generation blocks, for all threads
TRACKER = threading.Lock()

# how templates want a turn that only calls: an empty content or none, arguments as a mapping or as JSON text
FORMS = (("", False), ("", True), (None, False), (None, True))


class ChatTemplate:
    """A chat template (Jinja in transformers' sandbox) with a mask from spans.

    The conversation is rendered as it is, and once more with marks inside its texts; where the marked text without its
    marks equals the real one, the marks say where each text lies. No prefix is tokenised again, so templates that drop
    earlier thoughts (Qwen3) or strip contents are handled. Supervised: what the model writes, from the end of the
    generation prompt through thought, answer and tool calls to the end-of-turn token. A template's own ``{% generation
    %}`` blocks are used where it has them. A text that the template leaves out is an error, except earlier thoughts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        source: str | None = None,
        *,
        name: str = "chat_template",
        where: str | None = None,
        enable_thinking: bool | None = None,
    ):
        if source is None and not tokenizer.chat_template:
            raise ConfigError(
                "prompt_template 'chat_template': the tokenizer has no chat template; "
                "use prompt_template: chatml, llama2 or llama3, or a tokenizer with one"
            )
        self.name = name
        self.tokenizer = tokenizer
        # as text: transformers gives a template no function of ours to call
        self.source, self.dates = DATE_CALL.subn(
            lambda call: json.dumps(FIXED_DATE.strftime(call[2])), source or tokenizer.get_chat_template()
        )
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if enable_thinking is not None:
            self.variables["enable_thinking"] = enable_thinking
        self.generation = GENERATION.search(self.source) is not None
        self.tokens = control_tokens(tokenizer, self.control_tokens())
        self.control = self._pattern(self.tokens)
        self.prompted, self.stop = "", ""
        self.headers: dict[str, str] = {}
        self.ended = True
        self._learn(where or name)
        if not self.ended and tokenizer.eos_token is None:
            raise ConfigError(
                "the chat template ends an answer with no token and the tokenizer has no eos_token: the model could "
                "not learn to stop; use prompt_template: chatml"
            )
        self.control = self._pattern([*self.tokens, self.stop] if self.stop else self.tokens)

    def control_tokens(self) -> Sequence[str]:
        # added tokens shaped like <|...|> that the template prints are control tokens, marked special or not
        return [t for t in self.tokenizer.get_added_vocab() if t in self.source and re.fullmatch(r"<[|｜].*[|｜]>", t)]

    def warnings(self) -> list[str]:
        warnings = []
        if self.dates:
            warnings.append(
                f"the chat template prints the date; {FIXED_DATE:%d %b %Y} is used, so that data is the same every day"
            )
        if not self.ended:
            warnings.append(
                "the chat template puts no end-of-turn token after the last answer; "
                f"{self.tokenizer.eos_token} is appended and supervised, or the model would never stop"
            )
        return warnings

    def render(self, conversation: Conversation) -> Rendered:
        conversation, hidden = marks.hidden(conversation, self.control)
        text, printed, cuts = self._laid_out(conversation)
        if hidden and "\\ufdd1" in text:
            raise RowError("content", "the chat template escapes a control token in this row; remove the token")
        if not self.ended:
            last = max(cuts)
            text = text[: cuts[last][1]] + self.tokenizer.eos_token
            cuts[last] = (cuts[last][0], len(text))
        return Rendered(list(self._pieces(text, printed, cuts, conversation.messages)))

    # what is asked of the template once

    @staticmethod
    def _pattern(tokens: Sequence[str]) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def _learn(self, where: str) -> None:
        """Of a short conversation: the generation prompt, the end of an answer, the headers of user and assistant."""
        from jinja2 import TemplateSyntaxError

        turns = [Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
        try:
            self.prompted = self._rendered(Conversation(turns[:1]), ("", False), add_generation_prompt=True)[0]
        except RowError as error:  # it may want more turns than one
            if isinstance(error.__cause__, TemplateSyntaxError):
                line = f"{where}:{error.__cause__.lineno}"
                raise ConfigError(
                    f"the chat template is no valid Jinja: {error.__cause__.message}", where=line
                ) from None
        try:
            text, printed, cuts = self._laid_out(Conversation(turns[:2]))
        except RowError:
            return  # what is wrong with it, the first row tells
        end = cuts[1][1]
        within = self.control.findall(text, cuts[1][0], end) or TEXT_END.findall(text, cuts[1][0], end)
        after = TEXT_END.match(text, _after_space(text, end))
        if within:
            self.stop = within[-1]
        elif after:
            self.stop = after[0]
        else:
            self.ended, self.stop = False, self.tokenizer.eos_token or ""
        try:
            text, printed, cuts = self._laid_out(Conversation(turns))
        except RowError:
            return
        # an end of several tokens: those that also come before another turn
        first, last = text[printed[1].end :].lstrip(), text[printed[3].end :].lstrip()
        while (
            self.ended and (more := self.control.match(last, len(self.stop))) and first.startswith(last[: more.end()])
        ):
            self.stop = last[: more.end()]
        user = self._after_stop(text, printed[0].end)
        self.headers["assistant"] = text[user : cuts[1][0]]
        self.headers["user"] = text[self._after_stop(text, printed[1].end) : printed[2].start]

    # rendering

    def _rendered(
        self, conversation: Conversation, form: tuple[str | None, bool], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, spans of its generation blocks)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with TRACKER if self.generation else contextlib.nullcontext():
                rendered: Any = render_jinja_template(
                    conversations=[[_turn(message, form) for message in conversation.messages]],
                    tools=list(conversation.tools) or None,
                    chat_template=self.source,
                    return_assistant_tokens_mask=self.generation,
                    add_generation_prompt=add_generation_prompt,
                    **self.variables,
                )
        except Exception as error:  # a template may do anything that its sandbox does not forbid
            raise RowError("role", f"the chat template refuses these turns: {error}") from error
        texts, spans = rendered
        return texts[0], cast("list[tuple[int, int]]", spans[0] if spans else [])

    def _laid_out(self, conversation: Conversation) -> tuple[str, list[Printed], dict[int, tuple[int, int]]]:
        """(text, where its texts are printed, what the model writes of each assistant turn)."""
        calls = any(message.tool_calls for message in conversation.messages)
        errors = []
        for form in FORMS if calls else FORMS[:1]:
            try:
                return self._located(conversation, form)
            except RowError as error:
                errors.append(error)
        # that it refuses one of the forms tells less than what it lacks
        raise next((error for error in errors if error.column != "role"), errors[0])

    def _located(
        self, conversation: Conversation, form: tuple[str | None, bool]
    ) -> tuple[str, list[Printed], dict[int, tuple[int, int]]]:
        text, blocks = self._rendered(conversation, form)
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        for everyone in (True, False):
            for mark in (marks.outside, marks.inside, marks.thoughts):
                marked = marks.marked(conversation, mark, everyone=everyone)
                try:
                    marked_text, _ = self._rendered(marked, form)
                except RowError:
                    continue
                printed = marks.found(marked_text) if marks.MARK.sub("", marked_text) == text else None
                if printed is None:
                    continue
                self._all_printed(marked, printed)
                if len(blocks) == len(answers):
                    return text, printed, self._generated(text, dict(zip(answers, blocks, strict=True)))
                return text, printed, {i: self._written(conversation, form, text, printed, i) for i in answers}
        if blocks and len(blocks) == len(answers):
            printed = [Printed(i, "0", *block) for i, block in zip(answers, blocks, strict=True)]
            return text, printed, self._generated(text, dict(zip(answers, blocks, strict=True)))
        raise RowError(
            "content", "cannot find the answers in what the chat template prints; use prompt_template: chatml"
        )

    def _all_printed(self, marked: Conversation, printed: list[Printed]) -> None:
        last = len(marked.messages) - 1
        kept = {(item.turn, item.part) for item in printed}
        for turn, part in sorted(marks.names(marked) - kept):
            final = max((int(p) for t, p in marks.names(marked) if t == turn and p.isdigit()), default=0)
            if turn == last or part.startswith("n") or part == str(final):
                what = {"t": "the thought", "n": "the tool calls"}.get(part[0], "the text")
                column = {"t": "thinking", "n": "tool_calls"}.get(part[0], "content")
                role = marked.messages[turn].role
                raise RowError(
                    column,
                    f"the chat template does not print {what} of turn {turn + 1} ({role}); "
                    "remove it from the row, or use another prompt_template",
                )

    # what the model writes

    def _written(
        self, conversation: Conversation, form: tuple[str | None, bool], text: str, printed: list[Printed], turn: int
    ) -> tuple[int, int]:
        own = [item for item in printed if item.turn == turn]
        if own[0].part.startswith("n"):
            start = self._call_start(conversation, form, text, printed, turn)
        else:
            start = own[0].start
            tag = OPENING_TAG.search(text[max(0, start - 40) : start])
            # the tag before a thought is the model's to write, unless the generation prompt holds it
            if tag and not self.prompted.endswith(tag[0]):
                start -= len(tag[0])
        # with one space before the answer the model writes that space, in one token with the first word
        if start > 0 and text[start - 1] == " ":
            start -= 1
        if not conversation.messages[turn].tool_calls:
            return start, self._stopped(text, own[-1].end)
        limit = min((item.start for item in printed if item.start > own[-1].start), default=len(text))
        at = text.find(self.stop, own[-1].end, limit) if self.stop else -1
        if at < 0:
            raise RowError("tool_calls", f"cannot find the end of turn {turn + 1} in what the chat template prints")
        return start, at + len(self.stop)

    def _call_start(
        self, conversation: Conversation, form: tuple[str | None, bool], text: str, printed: list[Printed], turn: int
    ) -> int:
        """Where a turn that only calls begins: where its answer would, had it one in place of the calls."""
        plain = conversation.messages[turn]._replace(content=marks.outside("x", turn), tool_calls=())
        first = next(item.start for item in printed if item.turn == turn)
        before = max((item.end for item in printed if item.start < first), default=0)
        for later in (conversation.messages[turn + 1 :], []):
            messages = [*conversation.messages[:turn], plain, *later]
            try:
                whole = self._rendered(conversation._replace(messages=messages), form)[0]
            except RowError:
                continue
            # a space before an answer is the answer's, and calls may have none
            prefix = whole.partition(marks.OPEN)[0].removesuffix(" ")
            if text.startswith(prefix) and before <= len(prefix) <= first:
                return len(prefix)
        raise RowError("tool_calls", f"cannot find the tool calls of turn {turn + 1} in what the chat template prints")

    def _generated(self, text: str, blocks: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
        """What the template's own generation blocks hold, up to the end-of-turn token, which may come after them."""
        cuts = {}
        for turn, (start, end) in blocks.items():
            inside = text.rfind(self.stop, start, end) if self.stop else -1
            cuts[turn] = (start, inside + len(self.stop) if inside >= 0 else self._stopped(text, end))
        return cuts

    def _stopped(self, text: str, position: int) -> int:
        """Where the end-of-turn token that follows ``position`` ends, white space before it included."""
        start = _after_space(text, position)
        if self.stop and text.startswith(self.stop, start):
            return start + len(self.stop)
        match = self.control.match(text, start) if self.ended else None
        return match.end() if match else position

    # pieces

    def _after_stop(self, text: str, position: int) -> int:
        """Where the turn that has its last text up to ``position`` ends: after its end token and the space behind."""
        start = _after_space(text, position)
        if self.stop and text.endswith(self.stop, 0, position):
            return start
        match = self.control.match(text, start) or TEXT_END.match(text, start)
        return _after_space(text, match.end()) if match else position

    def _turn_starts(
        self, text: str, printed: list[Printed], cuts: dict[int, tuple[int, int]], messages: Sequence[Message]
    ) -> Iterator[tuple[int, int]]:
        """(position, turn) wherever another turn begins, headers included."""
        end, turn = 0, -1
        for item in printed:
            if item.turn != turn:
                header = self.headers.get(messages[item.turn].role)
                at = text.rfind(header, end, item.start) if header else -1
                if at >= 0:
                    begin = at
                elif turn == -1:
                    bos = self.tokenizer.bos_token or ""
                    begin = len(bos) if text.startswith(bos) else 0
                else:
                    start = cuts.get(item.turn, (item.start, 0))[0]
                    begin = min(self._after_stop(text, end), start)
                yield begin, item.turn
            turn = item.turn
            end = max(item.end, cuts.get(turn, (0, 0))[1])

    def _pieces(
        self, text: str, printed: list[Printed], cuts: dict[int, tuple[int, int]], messages: Sequence[Message]
    ) -> Iterator[Piece]:
        starts = dict(self._turn_starts(text, printed, cuts, messages))
        opens = {start: end for start, end in cuts.values()}
        data = {item.start: item.end for item in printed}
        points = {0, len(text), *starts, *opens, *opens.values(), *data, *data.values()}
        ordered = sorted(point for point in points if point <= len(text))
        turn, supervised_to, data_to = -1, 0, 0
        for start, end in zip(ordered, ordered[1:], strict=False):
            turn = starts.get(start, turn)
            supervised_to, data_to = opens.get(start, supervised_to), data.get(start, data_to)
            for part, escaped in marks.shown(text[start:end]):
                literal = start >= data_to and not escaped
                yield Piece(part, start < supervised_to, literal, turn)


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _turn(message: Message, form: tuple[str | None, bool]) -> dict[str, Any]:
    """The message as transformers' templates expect it."""
    blank, as_text = form
    turn: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.thinking:
        turn["reasoning_content"] = turn["thinking"] = message.thinking
    if message.tool_calls:
        turn["content"] = message.text or blank
        turn["tool_calls"] = []
        for call in message.tool_calls:
            arguments = call.arguments if isinstance(call.arguments, str) or not as_text else to_json(call.arguments)
            entry = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
            turn["tool_calls"].append({"id": call.id, **entry} if call.id else entry)
    if message.role == "tool":
        turn |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))}
    return turn
