"""Describe a GGUF file for ollama: how a prompt is laid out, how it is sampled, where an answer ends.

Ollama lays out a conversation by a Go template; the model's own chat template is a Jinja program. Rendered on
conversations of known parts, the program shows the text between the parts, of which the Go template is made. That is
checked on a longer conversation. A program that does more than put text between parts is left to ollama, which knows
the usual ones by what stands in the GGUF file.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from resmol.config.model_config import ModelConfig
from resmol.interop.export.exported_tokenizer import ExportedTokenizer
from resmol.interop.special_tokens import DEFAULT
from resmol.system.confined_program import run_confined

MODELFILE = "Modelfile"
BARE_PROMPT = "{{ .Prompt }}"
RENDER_SECONDS = 20.0
RENDER_BYTES = 4 << 30  # address space; a template can multiply a text
# The parts of the conversations, which a template must leave as they are.
_SYSTEM, _FIRST, _ANSWER, _SECOND = "Systemwords", "Firstquestion", "Firstanswer", "Secondquestion"


@dataclass(frozen=True)
class ChatLayout:
    """The text around the parts of a conversation.

    Attributes:
        before_system: Before the system's words.
        after_system: After them.
        before_user: Before a question.
        before_answer: Between a question and its answer.
        after_answer: After an answer.
        system: The system's words where a conversation has none; None if there are none either.
    """

    before_system: str
    after_system: str
    before_user: str
    before_answer: str
    after_answer: str
    system: str | None

    @property
    def can_be_written(self) -> bool:
        """Whether no text is taken for a sign of the Modelfile or of Go's templates."""
        return not any(sign in text for text in astuple(self) if text is not None for sign in ('"""', "{{", "}}"))

    def go_template(self) -> str:
        """Return ollama's template."""
        return (
            f"{{{{ if .System }}}}{self.before_system}{{{{ .System }}}}{self.after_system}{{{{ end }}}}"
            f"{{{{ if .Prompt }}}}{self.before_user}{{{{ .Prompt }}}}{self.before_answer}{{{{ end }}}}"
            f"{{{{ .Response }}}}{self.after_answer}"
        )

    def render(self, system: str, questions: list[str], answers: list[str]) -> str:
        """Return a conversation that ends with a question, as ollama lays it out."""
        turns = [
            f"{self.before_user}{question}{self.before_answer}{answer}{self.after_answer}"
            for question, answer in zip(questions, answers, strict=False)
        ]
        opened = f"{self.before_user}{questions[-1]}{self.before_answer}"
        return f"{self.before_system}{system}{self.after_system}{''.join(turns)}{opened}"


def modelfile(tokenizer: ExportedTokenizer, config: ModelConfig, file_name: str) -> str:
    """Return ollama's description of a model: a base model's prompt goes in as it is.

    The sampling is that of `resmol generate`; ollama's own default would penalize repetition.
    """
    tokens = tokenizer.tokens
    ends = dict.fromkeys((*tokens.ends, *(tokens.roles[role] for role in ("eos_token",) if role in tokens.roles)))
    spelled = [tokenizer.tokenizer.spelling(token) for token in ends]
    lines = [
        f"FROM ./{file_name}",
        *_layout_lines(tokenizer),
        f"PARAMETER num_ctx {config.max_position_embeddings}",
        "PARAMETER temperature 0.8",
        "PARAMETER top_k 50",
        "PARAMETER top_p 0.95",
        "PARAMETER repeat_penalty 1.0",
        *(f'PARAMETER stop "{end}"' for end in spelled if end and '"' not in end and end.isprintable()),
    ]
    return "\n".join(lines) + "\n"


def _layout_lines(tokenizer: ExportedTokenizer) -> list[str]:
    if not tokenizer.chats:
        return [f'TEMPLATE """{BARE_PROMPT}"""']
    layout = chat_layout(tokenizer)
    if layout is None or not layout.can_be_written:
        return ["# The chat template is in the GGUF file; ollama recognizes the usual ones."]
    system = [] if layout.system is None else [f'SYSTEM """{layout.system}"""']
    return [f'TEMPLATE """{layout.go_template()}"""', *system]


def chat_layout(tokenizer: ExportedTokenizer) -> ChatLayout | None:
    """Return what a chat template puts between the parts of a conversation, None if it does more than that."""
    system, first, answer, second = (
        {"role": role, "content": text}
        for role, text in (("system", _SYSTEM), ("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND))
    )
    last = [{"role": "assistant", "content": "x1"}, {"role": "user", "content": "x2"}]
    texts = _rendered(
        tokenizer,
        {"messages": [system, first, answer, second], "add_generation_prompt": True},
        {"messages": [system, first, answer], "add_generation_prompt": False},
        {"messages": [first], "add_generation_prompt": True},
        {"messages": [system, first, answer, second, *last], "add_generation_prompt": True},
    )
    if texts is None:
        return None
    opened = _between(texts[0], _SYSTEM, _FIRST, _ANSWER, _SECOND)
    closed = _between(texts[1], _SYSTEM, _FIRST, _ANSWER)
    alone = _between(texts[2], _FIRST)
    if opened is None or closed is None or alone is None:
        return None
    layout = _layout(opened, closed[-1], alone[0])
    same = layout is not None and layout.render(_SYSTEM, [_FIRST, _SECOND, "x2"], [_ANSWER, "x1"]) == texts[3]
    return layout if same and alone[1] == opened[4] else None


def _layout(opened: list[str], after_answer: str, begin: str) -> ChatLayout | None:
    """Cut the text between two parts into what belongs to the one and to the other.

    Args:
        opened: The text before, between and after the parts system, question, answer, question.
        after_answer: What follows an answer at the end.
        begin: What comes before a question without a system's words.
    """
    before_system, after_system_before_user, before_answer, after_answer_before_user, _ = opened
    before_user = after_answer_before_user.removeprefix(after_answer)
    if not after_answer_before_user.startswith(after_answer) or not after_system_before_user.endswith(before_user):
        return None
    after_system = after_system_before_user[: len(after_system_before_user) - len(before_user)]
    system = None
    if begin != before_user:
        around = len(before_system) + len(after_system_before_user)
        if len(begin) < around or not begin.startswith(before_system) or not begin.endswith(after_system_before_user):
            return None
        system = begin[len(before_system) : len(begin) - len(after_system_before_user)]
    return ChatLayout(before_system, after_system, before_user, before_answer, after_answer, system)


def _between(text: str, *parts: str) -> list[str] | None:
    """Return the text before, between and after parts that occur once each, in this order."""
    found = []
    for part in parts:
        before, part_found, text = text.partition(part)
        if not part_found or part in text:
            return None
        found.append(before)
    return [*found, text]


def _rendered(tokenizer: ExportedTokenizer, *conversations: dict[str, Any]) -> list[str] | None:
    """Render conversations, without the begin token that the tokenizer adds; None if the template cannot."""
    tokens = {role: tokenizer.tokenizer.spelling(token) for role, token in tokenizer.tokens.roles.items()}
    template = tokenizer.tokens.chat_templates[DEFAULT]
    request = {"template": template, "tokens": tokens, "conversations": conversations}
    program = Path(__file__).with_name("render_chat_template.py")
    try:
        done = run_confined(program, json.dumps(request).encode(), memory_bytes=RENDER_BYTES, seconds=RENDER_SECONDS)
        done.check_returncode()
    except SubprocessError:
        return None
    texts: list[str] = json.loads(done.stdout)
    begin = "".join(tokenizer.tokenizer.spelling(token) or "" for token in tokenizer.before)
    return [text.removeprefix(begin) for text in texts]
