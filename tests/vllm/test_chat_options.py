"""What a pack's prompts take along comes out of vLLM's own renderer as it does of ours."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.renderers import hf
from vllm.renderers.chat_utils import load_chat_template, validate_chat_template
from vllm.renderers.params import ChatParams

from chat_templates import FORGETFUL, THINKING, TOOLS, WEATHER, text_of, tokenizer_with
from tascade.data.chat import ChatConfig
from tascade.data.encode import encode_prompt, system_template

SYSTEM = 'Say "it\'s" {% raw %} é 😀\n%} \\n {{x}}'
MINE = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
LONGER: list[dict[str, str]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "b"},
]


def rendered(tokenizer: Any, messages: list[dict[str, str]], chat: ChatConfig) -> str:
    template = system_template(tokenizer, chat) if chat.system else tokenizer.chat_template
    validate_chat_template(template)
    kwargs = json.loads(json.dumps(chat.kwargs)) | {"tokenize": False}
    params = ChatParams(
        chat_template=load_chat_template(template),
        chat_template_kwargs={"add_generation_prompt": True},
    )
    given = params.with_defaults(kwargs).get_apply_chat_template_kwargs()
    config: Any = SimpleNamespace(trust_remote_code=False, multimodal_config=None)
    return str(hf.safe_apply_chat_template(config, tokenizer, messages, **given))


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize(
    ("template", "more"),
    [
        (THINKING, {"options": {"enable_thinking": False}}),
        (FORGETFUL, {"options": {"enable_thinking": False}}),
        (TOOLS, {"options": {"style": "brief"}, "tools": [WEATHER]}),
    ],
)
def test_vllm_renders_what_we_render(template: str, more: dict[str, Any], system: str) -> None:
    tokenizer, chat = tokenizer_with(template), ChatConfig(system=system, **more)
    for messages in (LONGER[:1], LONGER, MINE):
        wanted = text_of(encode_prompt(tokenizer, messages, chat))
        assert rendered(tokenizer, messages, chat) == wanted


def test_vllm_reads_the_same_of_a_template_with_a_system_prompt() -> None:
    for template in (THINKING, TOOLS):
        made = system_template(tokenizer_with(template), ChatConfig(system=SYSTEM))
        found = [hf._detect_content_format(t, default="string") for t in (template, made)]
        assert found[0] == found[1]
        assert not hf._detect_developer_role_support(made)
