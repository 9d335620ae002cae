"""Conversations to train on their responses: prompt and response, or a list of messages, and the text around them.

A template says what stands before and after a message of each role. What is learned is the text of the assistant's
messages and what stands after them; the rest is only read. Markers are ordinary text to the tokenizer, so a message
that holds one, or "</s>", is no more than that text: control ids never come from it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.errors import UserError

ROLES = ("system", "user", "assistant")
Segments = tuple[tuple[str, bool], ...]
"""Texts one after another, each with whether it is learned; neighbours differ in that."""


@dataclass(frozen=True)
class Template:
    """What stands before and after a message, by role."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]


TEMPLATES = {
    "none": Template(("", ""), ("", ""), ("", "")),
    "plain": Template(("", "\n\n"), ("User: ", "\n\n"), ("Assistant: ", "\n\n")),
    "chatml": Template(
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ),
}


def template_of(name: str) -> Template:
    """A template by name, or from a TOML file with [system], [user] and [assistant], each with `before` and `after`.

    UserError if there is neither, naming every problem of the file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = Path(name)
    advice = (
        f"use {', '.join(TEMPLATES)}, or a TOML file with before and after in [system], [user], [assistant]"
    )
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(f"is no chat template: {e}", where=name, do=advice) from e
    wrong = [f"unknown section [{key}]" for key in content if key not in ROLES]
    for role in ROLES:
        section = content.get(role)
        if not isinstance(section, dict) or sorted(section) != ["after", "before"]:
            wrong.append(f"[{role}] needs before and after, and nothing else")
        elif not all(isinstance(value, str) for value in section.values()):
            wrong.append(f"[{role}] before and after must be strings")
    if wrong:
        raise UserError("; ".join(wrong), where=name, do=advice)
    return Template(*((content[role]["before"], content[role]["after"]) for role in ROLES))


@dataclass(frozen=True)
class ChatFormat:
    """Where the conversation is in a JSON object, and how it becomes text."""

    chat_key: str = ""
    """Key of a list of {"role": ..., "content": ...}; "" where prompt and response are given."""
    prompt_key: str = ""
    response_key: str = ""
    template: Template = field(default_factory=lambda: TEMPLATES["chatml"])

    def segments(self, value: Mapping[str, Any]) -> Segments | str:
        """The text of a conversation in parts; why it is unusable, in words, if it is."""
        messages = self._messages(value)
        if isinstance(messages, str):
            return messages
        found: list[tuple[str, bool]] = []
        for role, text in messages:
            before, after = getattr(self.template, role)
            learned = role == "assistant"
            parts = [(before, False), (text + after, True)] if learned else [(before + text + after, False)]
            for part, counts in parts:
                if found and found[-1][1] == counts:
                    found[-1] = (found[-1][0] + part, counts)
                elif part:
                    found.append((part, counts))
        return tuple(found)

    def _messages(self, value: Mapping[str, Any]) -> list[tuple[str, str]] | str:
        if not self.chat_key:
            found = []
            for key, role in ((self.prompt_key, "user"), (self.response_key, "assistant")):
                if not isinstance(value.get(key), str):
                    return f"no text under {key!r}, only " + ", ".join(map(repr, list(value)[:5]))
                found.append((role, value[key]))
            return found if found[1][1] else f"{self.response_key!r} is empty"
        given = value.get(self.chat_key)
        if not isinstance(given, list):
            return f"no list of messages under {self.chat_key!r}, only " + ", ".join(
                map(repr, list(value)[:5])
            )
        found, last = [], ""
        for number, message in enumerate(given, 1):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                return f"message {number} has no text under 'content'"
            role = str(message.get("role"))
            if role not in ROLES:
                return f"message {number} has role {role!r}; known are {', '.join(ROLES)}"
            if (role == "system" and number > 1) or role == last:
                return f"message {number} ({role}) follows {last}: system comes first, then user and assistant in turn"
            if role == "assistant" and not message["content"]:
                return f"message {number}: the response is empty"
            found.append((role, message["content"]))
            last = role
        return found if any(role == "assistant" for role, _ in found) else "no message of an assistant"
