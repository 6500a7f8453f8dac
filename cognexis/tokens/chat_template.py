"""Renders chats so that only the template itself can write control tokens.

Before rendering, every control string in the template's source becomes one private-use character that occurs nowhere
in the messages, tools, documents and variables. After rendering, those characters mark the template's own control
tokens; everything else is text, whatever it spells and however the template cut or joined it. The values themselves
are not touched, so comparisons and filters of a template work as ever.

A template may build role markers from the role (``'<|' + message['role'] + '|>'``). This form is recognised and gives
a marker for the four known roles; any other way of building control tokens from pieces is refused.
"""

import bisect
import dataclasses
import hashlib
import itertools
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import render_jinja_template

from cognexis.errors import InvalidConfigError, TokenizerError
from cognexis.tokens.chatml import CHAT_TEMPLATE, CHAT_TEMPLATE_ID, ROLES
from cognexis.tokens.guard import ControlGuard, strings_in

_FIRST_PRIVATE, _LAST_PRIVATE = 0x100000, 0x10FFFD  # plane 16, assigned to nothing
_ROLE_VARIABLE = "cognexis_role_markers"
_ROLE_ACCESS = r"""\w+(?:\.role\b|\[\s*['"]role['"]\s*\])"""
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_UNKNOWN_TOKEN = re.compile(r"<\|[^|<>\s{}'\"]{1,64}\|>")
_TOKEN_IN_PIECES = re.compile(r"""<\|\s*(?:['"]\s*[+~]|\{\{)""")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_rendering = threading.Lock()  # the generation tracker of transformers serves one rendering at a time


@dataclasses.dataclass(frozen=True)
class RenderedChat:
    """A chat as text, with what in it is the template's own.

    Attributes:
        text: the whole chat.
        control: (start, end) of each control token that the template wrote, in order.
        generated: (start, end) of what stands between ``{% generation %}`` tags, in order.
        forged: a control string that is not the template's own, or None.
    """

    text: str
    control: tuple[tuple[int, int], ...]
    generated: tuple[tuple[int, int], ...]
    forged: str | None

    def segments(self) -> list[tuple[int, int, bool]]:
        """The text in parts (start, end, is_control); a part ends where the assistant's turn begins, too.

        A prompt that ends with the assistant's marker is therefore a prefix of the chat in tokens as well.
        """
        is_control = set(self.control)
        edges = {0, len(self.text), *(start for start, _ in self.generated)}
        edges.update(edge for span in self.control for edge in span)
        ordered = sorted(edge for edge in edges if edge <= len(self.text))
        return [(a, b, (a, b) in is_control) for a, b in itertools.pairwise(ordered)]


def chat_template_id(template: Any) -> str | None:
    """``chatml_v1``, the digest of another template, or None where there is none."""
    if not template:
        return None
    if template == CHAT_TEMPLATE:
        return CHAT_TEMPLATE_ID
    if isinstance(template, dict):
        template = "\0".join(f"{name}\0{template[name]}" for name in sorted(template))
    return f"sha256:{hashlib.sha256(template.encode()).hexdigest()}"


def render_chats(
    conversations: Sequence[Any],
    template: str,
    guard: ControlGuard,
    special_tokens: Mapping[str, str],
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    variables: Mapping[str, Any] | None = None,
) -> list[RenderedChat]:
    """Render chats with a template that may be anybody's.

    Args:
        conversations: lists of messages.
        template: Jinja source.
        guard: the tokenizer's control strings.
        special_tokens: the variables such as ``bos_token`` that templates may use.
        tools: schemas, or functions to make schemas of.
        documents: dictionaries with a title and a text.
        add_generation_prompt: end with the assistant's marker.
        continue_final_message: leave the last message open.
        variables: further variables; text like everything that is not the template's.

    Raises:
        InvalidConfigError: a chat or role that the template has no form for, a template that names an unknown special
            token or builds one from pieces, or that does not run.
        TokenizerError: the values use up every private-use character.
    """
    is_ours = template == CHAT_TEMPLATE
    chats = [check_messages(conversation, is_ours) for conversation in conversations]
    values = {
        "tools": plain_data([_tool_schema(tool) for tool in tools]) if tools is not None else None,
        "documents": plain_data(documents),
        "variables": {str(name): plain_data(value) for name, value in (variables or {}).items()},
    }
    first = _free_range(len(guard.reserved), strings_in([template, chats, *values.values()]))
    source = _mark_template(template, guard.reserved, first)
    marks = {token: chr(first + index) for index, token in enumerate(guard.reserved)}
    own: dict[str, Any] = {
        name: marks.get(token, token) for name, token in special_tokens.items() if isinstance(token, str)
    }
    if _ROLE_VARIABLE in source:
        own[_ROLE_VARIABLE] = {role: marks[f"<|{role}|>"] for role in ROLES if f"<|{role}|>" in marks}
    try:
        with _rendering:
            rendered: Any = render_jinja_template(
                conversations=chats,
                tools=values["tools"],
                documents=values["documents"],
                chat_template=source,
                return_assistant_tokens_mask=bool(_GENERATION_TAG.search(source)),
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **{**own, **values["variables"]},
            )
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise InvalidConfigError(f"the chat template refused the chat: {error}", path="chat_template") from error
    texts, generated = rendered
    spans = generated or [[] for _ in texts]
    return [_without_marks(text, span, guard, first) for text, span in zip(texts, spans, strict=True)]


def check_messages(conversation: Any, is_ours: bool) -> list[dict[str, Any]]:
    """The messages as plain data without keys that are None.

    Raises:
        InvalidConfigError: not a list, empty, a message that is no dictionary, or a role that is none.
    """
    messages = plain_data(getattr(conversation, "messages", conversation))
    if not isinstance(messages, list) or not messages:
        raise InvalidConfigError("a chat must be a list of at least one message", path="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidConfigError(f"message {index} must be a dictionary, got {type(message).__name__}")
        role = message.get("role")
        allowed = role in ROLES if is_ours else isinstance(role, str) and re.fullmatch(r"[A-Za-z][\w.-]{0,63}", role)
        if not allowed:
            raise InvalidConfigError(
                f"unknown role {str(role)[:40]!r} in message {index}: must be one of {', '.join(ROLES)}",
                path="role",
                value=role,
            )
        content = message.get("content")
        if is_ours and content is None and not message.get("tool_calls"):
            raise InvalidConfigError(f"message {index} has no content", path="content")
        if content is not None and not isinstance(content, str | list):
            raise InvalidConfigError(
                f"content of message {index} must be a string or a list of parts, got {type(content).__name__}",
                path="content",
            )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def plain_data(value: Any) -> Any:
    """Rebuild ``value`` from dictionaries, lists, strings and numbers, so that a template gets no rich objects."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # of subclasses, such as enumerations, only the value
        return str.__str__(value)
    if isinstance(value, int | float):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain_data(value.model_dump())
    return f"<{type(value).__name__}>"


def _tool_schema(tool: Any) -> Any:
    return get_json_schema(tool) if callable(tool) and not isinstance(tool, Mapping) else tool


def _free_range(size: int, texts: Iterable[str]) -> int:
    """The first of ``size`` neighbouring private-use characters that occur in none of ``texts``."""
    pattern = re.compile(f"[{chr(_FIRST_PRIVATE)}-{chr(_LAST_PRIVATE)}]")
    used = {ord(character) for text in texts if not text.isascii() for character in pattern.findall(text)}
    first = _FIRST_PRIVATE
    for taken in sorted(used):
        if taken >= first + size:
            break
        first = taken + 1
    if first + size > _LAST_PRIVATE:
        raise TokenizerError(
            "the chat uses every private-use character of plane 16; none is left to mark the template"
        )
    return first


@lru_cache(maxsize=64)
def _mark_template(template: str, reserved: tuple[str, ...], first: int) -> str:
    """The template's source with a private-use character for each control token."""
    source = template
    if all(f"<|{role}|>" in reserved for role in ROLES):
        chosen = rf"{_ROLE_VARIABLE}[\g<role>]"
        source = re.sub(
            rf"""(?P<open>['"])<\|(?P=open)\s*[+~]\s*(?P<role>{_ROLE_ACCESS})\s*[+~]\s*(?P<close>['"])\|>""",
            rf"{chosen} + \g<close>",
            source,
        )
        source = re.sub(rf"<\|\{{\{{-?\s*(?P<role>{_ROLE_ACCESS})\s*-?\}}\}}\|>", f"{{{{ {chosen} }}}}", source)
    for index, token in enumerate(reserved):
        source = source.replace(token, chr(first + index))
    code = _COMMENT.sub("", source)
    if unknown := _UNKNOWN_TOKEN.search(code):
        raise InvalidConfigError(
            f"the chat template names {unknown[0]}, which is no special token of this tokenizer", path="chat_template"
        )
    if any(token.startswith("<|") for token in reserved) and _TOKEN_IN_PIECES.search(code):
        raise InvalidConfigError(
            "the chat template builds control tokens from pieces ('<|' + ...); write them out, so that text cannot "
            "become one",
            path="chat_template",
        )
    return source


def _without_marks(marked: str, generated: Iterable[Any], guard: ControlGuard, first: int) -> RenderedChat:
    """Put the control strings back, and say where they are."""
    parts: list[str] = []
    control: list[tuple[int, int]] = []
    moved: list[tuple[int, int]] = []  # position in the marked text, growth up to there
    length = end = 0
    for match in re.finditer(f"[{chr(first)}-{chr(first + max(0, len(guard.reserved) - 1))}]", marked):
        token = guard.reserved[ord(match[0]) - first]
        parts += [marked[end : match.start()], token]
        start = length + match.start() - end
        length, end = start + len(token), match.end()
        control.append((start, length))
        moved.append((end, length - end))
    parts.append(marked[end:])
    text = "".join(parts)

    def place(edge: int) -> int:
        before = bisect.bisect_right(moved, edge, key=lambda mark: mark[0])
        return min(len(text), edge + (moved[before - 1][1] if before else 0))

    spans = [(place(a), place(b)) for a, b in generated]
    return RenderedChat(text, tuple(control), tuple(span for span in spans if span[0] < span[1]), guard.find(marked))
