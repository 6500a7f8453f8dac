"""The chat template ``chatml_v1``, which every tokenizer of the package starts with."""

CHAT_TEMPLATE_ID = "chatml_v1"
ROLES = ("system", "user", "assistant", "tool")

CHAT_TEMPLATE = """\
{%- set markers = {
    "system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|tool|>"
} -%}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part is mapping and part["text"] is string -%}
                {{- part["text"] -}}
            {%- else -%}
                {{- raise_exception("content must be a string or a list of text parts") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if not messages -%}
    {{- raise_exception("a chat needs at least one message") -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] not in markers -%}
        {{- raise_exception("unknown role: " ~ message["role"]) -}}
    {%- endif -%}
    {{- markers[message["role"]] ~ "\\n" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}
            {{- text_of(message["content"]) ~ "<|end|>" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- text_of(message["content"]) ~ "<|end|>" -}}
    {%- endif -%}
    {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>\\n" -}}
{%- endif -%}
"""
"""The template ``chatml_v1``: role marker, newline, content, ``<|end|>``, newline for each message.

The assistant's content and its ``<|end|>`` are marked as generated, so
``apply_chat_template(..., return_assistant_tokens_mask=True)`` gives the training mask. Content is a string or a list
of text parts. Tools, documents and tool calls have no form in it and are left out.
"""
