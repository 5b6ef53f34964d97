"""Chat templates after the manner of real ones, for the byte tokenizer of tascade.testing."""

from __future__ import annotations

from typing import Any

from tascade.testing import byte_tokenizer

THINKING = """
{%- for message in messages -%}
{{ '<|' ~ message.role ~ '|>' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif -%}
{{ message.content ~ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif -%}
{%- endif -%}"""
"""A switch for thoughts; an answer in a conversation begins with an empty one (as in Qwen3)."""

FORGETFUL = THINKING.replace("message.role == 'assistant' and loop.last", "false")
"""The same, but conversations have no thoughts at all."""

TOOLS = """
{%- if messages[0]['role'] == 'system' -%}
{%- set said = messages[0]['content'] -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set said = 'You help.' -%}{%- endif -%}
<|system|>{{ said | trim }}
{%- if tools %} You may call:
{%- for tool in tools %} {{ tool.function | tojson }}{% endfor %}{% endif -%}
{% if style is defined %} Be {{ style }}.{% endif -%}
<|end|>
{%- for message in messages -%}
{%- if message['role'] not in ['user', 'assistant'] -%}
{{ raise_exception('no role ' ~ message['role']) }}
{%- endif -%}
<|{{ message['role'] }}|>{{ message['content'] }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}"""
"""A system message of its own by default, tools as JSON in it (as in Llama 3 and Hermes)."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Tells the weather: é, "quoted", {% raw %}.',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def tokenizer_with(template: str | None) -> Any:
    """The byte tokenizer with a chat template, or with none."""
    made = byte_tokenizer()
    made.chat_template = template
    return made


def text_of(ids: Any) -> str:
    """What token ids stand for, marks of the template included."""
    return str(byte_tokenizer().decode(ids))
