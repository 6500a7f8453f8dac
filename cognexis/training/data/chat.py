"""Chats as training documents: rendered by the tokenizer's template, learned where the assistant speaks.

A record is ``{"messages": [{"role", "content"}, ...], "system": "...", "metadata": {...}}``; the last two are
optional, and ``system`` stands for a first message of that role. A control string in any content refuses the record.
"""

import json
from typing import Any

from cognexis.errors import InvalidConfigError, TokenizerError
from cognexis.training.data.corruption import RecordFault

LEARNED = ("assistant", "all")


def chat_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record, the system message first.

    Raises:
        RecordFault: ``bad_chat``, with the rule that is broken.
    """
    messages, system = record.get("messages"), record.get("system")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RecordFault("bad_chat", "messages must be a list of objects with role and content")
    if "metadata" in record and not isinstance(record["metadata"], dict):
        raise RecordFault("bad_chat", "metadata must be an object")
    if system is not None:
        if not isinstance(system, str):
            raise RecordFault("bad_chat", "system must be a string")
        messages = [{"role": "system", "content": system}, *messages]
    places = [index for index, message in enumerate(messages) if message.get("role") == "system"]
    if places not in ([], [0]):
        raise RecordFault("bad_chat", f"one system message at most, in front; found at {places}")
    for index, message in enumerate(messages):
        _check_tool_calls(index, message.get("tool_calls"))
    return messages


def encode_chat(
    tokenizer: Any, record: dict[str, Any], learned: str = "assistant", learn_end: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a chat and, for each, whether it is learned.

    Args:
        tokenizer: a ``CognexisTokenizer``.
        record: see the module docstring.
        learned: ``assistant`` learns what the assistant says, ``all`` every token.
        learn_end: learn the ``<|end|>`` behind it, too.

    Raises:
        RecordFault: a broken rule, a control string, or nothing to learn.
    """
    messages = chat_messages(record)
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=record.get("tools"), return_assistant_tokens_mask=True, on_control="raise"
        )
    except TokenizerError as error:
        raise RecordFault("control_token", str(error)) from None
    except InvalidConfigError as error:
        raise RecordFault("bad_chat", str(error)) from None
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if learned == "all":
        mask = [1] * len(ids)
    elif not learn_end:
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        mask = [int(flag and token != end) for token, flag in zip(ids, mask, strict=True)]
    said = [message for message in messages if message.get("role") == "assistant" and message.get("content")]
    if not any(mask) or (learned == "assistant" and not said):
        raise RecordFault("no_target", "the assistant says nothing")
    return ids, mask


def _check_tool_calls(index: int, calls: Any) -> None:
    if calls is None:
        return
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordFault("bad_chat", f"tool_calls of message {index} must be objects with a function name")
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise RecordFault("bad_chat", f"tool_calls of message {index}: arguments must be one JSON object")
