"""What prompts take along into the chat template: kept with a pack, and in force in every use."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from typer.testing import CliRunner

from chat_templates import FORGETFUL, THINKING, TOOLS, WEATHER, text_of, tokenizer_with
from tascade.bench.memory import MemoryJob, measure_here
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.cli import verbs as cli
from tascade.config import Recipe, SpecConfig, VocabConfig
from tascade.core import Example
from tascade.data.chat import ChatConfig
from tascade.data.encode import encode_example, encode_prompt, fingerprint, system_template
from tascade.enrich.choose import enrich
from tascade.errors import ConfigError, PackError
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import adapt, tailor
from tascade.serve.vllm_command import vllm_command
from tascade.testing import tiny_model

END = 256
NO_THOUGHTS = ChatConfig(options={"enable_thinking": False})
BRIEF = ChatConfig(system="Speak Dutch.", options={"style": "brief"}, tools=(WEATHER,))
ROWS = [{"prompt": f"item {i}", "completion": f"number {i % 7} of all"} for i in range(60)]


def encoded(template: str, chat: ChatConfig, prompt: Any = "hi", said: str = "yes") -> list[str]:
    row = encode_example(tokenizer_with(template), Example(prompt, said), [END], chat)
    return [text_of(ids) for ids in row if ids is not None]


# --- encoding ---------------------------------------------------------------------------------


def test_a_switch_of_the_template_is_switched() -> None:
    asked = "<|user|>hi<|end|><|assistant|>"
    assert encoded(THINKING, ChatConfig()) == [asked, "<think></think>yes<|end|>"]
    for template in (THINKING, FORGETFUL):
        # As the model says it behind the prompt, whatever a conversation looks like.
        found = encoded(template, NO_THOUGHTS)
        assert found == [asked + "<think></think>", "yes<|end|>"]
    assert encoded(FORGETFUL, NO_THOUGHTS, said=" end ")[1] == " end <|end|>"
    assert encoded(FORGETFUL, ChatConfig(options={"enable_thinking": True}))[0] == asked


def test_an_answer_by_itself_ends_as_the_template_ends_it() -> None:
    template = FORGETFUL.replace("<|end|>'", "<|system|>' ")
    tokenizer = tokenizer_with(template)
    ids = encode_example(tokenizer, Example("hi", "yes"), [END, 257], NO_THOUGHTS)[1]
    assert ids[-1] == 257  # not the model's first end token
    ids = encode_example(tokenizer, Example("hi", "yes"), [END], NO_THOUGHTS)[1]
    assert text_of(ids) == "yes<|end|>"


def test_a_system_prompt_and_tools_stand_in_the_prompt() -> None:
    tool = json.dumps(WEATHER["function"], ensure_ascii=False)
    found = encoded(TOOLS, BRIEF)[0]
    assert found == (
        f"<|system|>Speak Dutch. You may call: {tool} Be brief.<|end|>"
        "<|user|>hi<|end|><|assistant|>"
    )
    assert encoded(TOOLS, BRIEF)[1] == "yes<|end|>"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_rows_own_system_message_wins(role: str) -> None:
    own = ({"role": role, "content": "Mine."}, {"role": "user", "content": "hi"})
    template = TOOLS.replace("== 'system'", "in ['system', 'developer']")
    assert encoded(template, BRIEF, own)[0].startswith("<|system|>Mine. You may call: ")


def test_the_variables_of_a_request_win_one_by_one() -> None:
    tokenizer = tokenizer_with(TOOLS + "{{ style }}{{ tone }}")
    chat = ChatConfig(options={"style": "brief", "tone": "dry"}, tools=(WEATHER,))
    for given, wanted in (
        ({}, "brief dry weather"),
        ({"tone": "warm"}, "brief warm weather"),
        ({"tools": []}, "brief dry"),
        ({"tools": [{"function": {"name": "clock"}}], "style": "long"}, "long dry clock"),
    ):
        text = text_of(encode_prompt(tokenizer, "hi", chat.over(given)))
        words = ["weather" * ("weather" in text), "clock" * ("clock" in text)]
        style, tone = chat.over(given).options["style"], chat.over(given).options["tone"]
        assert text.endswith(style + tone)
        assert " ".join([style, tone, *filter(None, words)]) == wanted


HALF = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]


@pytest.mark.parametrize("template", [FORGETFUL, TOOLS])
def test_a_last_message_of_the_assistants_is_continued(template: str) -> None:
    tokenizer = tokenizer_with(template)
    wanted = tokenizer.apply_chat_template(HALF, continue_final_message=True, tokenize=False)
    assert wanted.endswith("The answer is")
    assert text_of(encode_prompt(tokenizer, HALF)) == wanted
    assert text_of(encode_prompt(tokenizer, HALF, continue_final_message=True)) == wanted
    ended = text_of(encode_prompt(tokenizer, HALF, continue_final_message=False))
    assert ended == wanted + "<|end|><|assistant|>"
    own = text_of(encode_prompt(tokenizer, HALF[:1], continue_final_message=True))
    assert own.endswith("<|user|>q")
    # And an example's answer goes on behind it.
    prompt, answer = encode_example(tokenizer, Example(HALF, " 42."), [END])
    assert (text_of(prompt), text_of(answer)) == (wanted, " 42.<|end|>")


def test_an_end_that_a_tokenizer_puts_behind_every_text_ends_no_prompt() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 258), ("<|end|>", 256)]
    )
    assert tokenizer("ab").input_ids == [258, 97, 98, 256]
    assert encode_prompt(tokenizer, "ab").tolist() == [258, 97, 98]
    assert encode_prompt(tokenizer, "ab<|end|>").tolist() == [258, 97, 98, 256]
    prompt, answer = encode_example(tokenizer, Example("ab", "cd"), [END])
    assert (prompt.tolist(), answer.tolist()) == ([258, 97, 98], [99, 100, 256])


def test_what_a_template_cannot_take_is_refused() -> None:
    for chat in (NO_THOUGHTS, ChatConfig(system="x"), ChatConfig(tools=(WEATHER,))):
        with pytest.raises(ConfigError, match="no chat template"):
            encode_prompt(tokenizer_with(None), "hi", chat)
    assert text_of(encode_prompt(tokenizer_with(None), "hi")) == "hi"
    with pytest.raises(ConfigError, match="no variable 'enable_thinkin'"):
        encode_prompt(tokenizer_with(THINKING), "hi", ChatConfig(options={"enable_thinkin": False}))
    with pytest.raises(ConfigError, match="no variable 'tools'"):
        encode_prompt(tokenizer_with(THINKING), "hi", ChatConfig(tools=(WEATHER,)))
    with pytest.raises(ConfigError, match="refuses the messages: no role tool"):
        encode_prompt(tokenizer_with(TOOLS), [{"role": "tool", "content": "x"}])
    with pytest.raises(ConfigError, match="refuses the messages"):
        encode_prompt(tokenizer_with(TOOLS), "hi", ChatConfig(tools=({"type": "function"},)))


# --- recipes ----------------------------------------------------------------------------------

TEXT = """
chat:
  system: Speak Dutch.
  options: {enable_thinking: false, depth: 2, share: 0.5, none: null, list: [a, {b: c}]}
  tools:
    - type: function
      function: {name: weather, parameters: {type: object, properties: {}}}
"""


def test_a_recipes_chat_section_survives_yaml_and_json(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TEXT)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.chat.options["list"] == ["a", {"b": "c"}]
    assert recipe.chat.tools[0]["function"]["name"] == "weather"
    recipe.to_yaml(tmp_path / "again.yaml")
    assert Recipe.from_yaml(tmp_path / "again.yaml") == recipe
    assert ChatConfig(**json.loads(json.dumps(recipe.to_dict()))["chat"]) == recipe.chat


NESTED: Any = []
for _ in range(40):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chat: 5", "chat"),
        ("chat: {sytem: x}", "'system'"),
        ("chat: {system: 5}", "system"),
        ("chat: {system: [x]}", "system"),
        ("chat: {options: [a]}", "chat.options"),
        ("chat: {options: {2: a}}", "chat.options"),
        ("chat: {options: {a-b: 1}}", "chat.options"),
        ("chat: {options: {a: {2: b}}}", "chat.options.a"),
        ("chat: {options: {a: 2026-01-01}}", "chat.options.a"),
        ("chat: {options: {a: .nan}}", "chat.options.a"),
        ("chat: {options: {a: [1, .inf]}}", "chat.options.a[1]"),
        ("chat: {options: {a: !!binary aGk=}}", "chat.options.a"),
        ("chat: {options: {tools: []}}", "a key of their own"),
        ("chat: {options: {chat_template: x}}", "chat_template"),
        ("chat: {options: {add_generation_prompt: false}}", "add_generation_prompt"),
        ("chat: {tools: {type: function}}", "chat.tools"),
        ("chat: {tools: [weather]}", "chat.tools[0]"),
        (f"chat: {{options: {{a: {json.dumps(NESTED)}}}}}", "too deeply"),
    ],
)
def test_a_wrong_chat_section_is_refused_with_its_place(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert said in str(caught.value)


def test_text_that_is_none_is_refused() -> None:
    for wrong in ({"system": "\ud800"}, {"options": {"a": "\ud800"}}, {"options": {"a": math.nan}}):
        with pytest.raises(ConfigError):
            ChatConfig(**wrong)  # type: ignore[arg-type]


# --- packs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says whatever it likes, and knows tools, with its tokenizer."""
    made = tmp_path_factory.mktemp("chat") / "model"
    model = tiny_model("llama", vocab_size=260)
    model.generation_config.eos_token_id = END
    model.save_pretrained(made)
    tokenizer_with(TOOLS).save_pretrained(made)
    return made


SMALL = Recipe(dtype="float32", max_new_tokens=8, spec=SpecConfig(calibration_rows=2))


@pytest.fixture(scope="module")
def pack(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "pack"
    adapt(folder, ROWS, out=out, recipe=replace(SMALL, chat=BRIEF))
    return out


def prompt_in(template: str, chat: ChatConfig, prompt: str = "item 3") -> list[int]:
    return encode_prompt(tokenizer_with(template), prompt, chat).tolist()


def seen_prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that any loop is asked to answer from now on."""
    from tascade.decode.loop import Decoder

    found: list[list[int]] = []
    whole = Decoder.stream

    def watched(self: Any, prompt: Any, *args: Any, **options: Any) -> Any:
        found.append(list(map(int, prompt)))
        return whole(self, prompt, *args, **options)

    monkeypatch.setattr(Decoder, "stream", watched)
    return found


def test_a_pack_keeps_what_its_prompts_take_along(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Pack.open(pack).chat == BRIEF
    assert Pack.open(pack).info.fingerprint == fingerprint(tokenizer_with(TOOLS))
    model = TaskModel.from_pretrained(pack)
    wanted = prompt_in(TOOLS, BRIEF)
    assert model.encode("item 3").tolist() == wanted
    seen = seen_prompts(monkeypatch)
    model.run("item 3", max_new_tokens=4)
    model.generate(["item 3"], max_new_tokens=4)
    list(model.stream("item 3", max_new_tokens=4))
    assert len(seen) == 3
    assert all(prompt == wanted for prompt in seen)
    assert model.similar is not None
    assert model.similar.rank(wanted)[0][0] == 2  # the first row is held out


def test_an_older_pack_takes_nothing_along(pack: Path, folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "pack"
    made = adapt(folder, ROWS, out=plain, recipe=SMALL)
    raw = json.loads((plain / "pack.json").read_text())
    del raw["recipe"]["chat"]  # as 0.1.0 wrote it
    (plain / "pack.json").write_text(json.dumps(raw))
    model = TaskModel.from_pretrained(plain)
    assert not model.chat
    assert model.pack.info.fingerprint == made.pack.info.fingerprint
    assert model.encode("item 3").tolist() == prompt_in(TOOLS, ChatConfig())
    assert "--default-chat-template-kwargs" not in vllm_command(Pack.open(plain))


@pytest.mark.parametrize(
    "chat", [None, [], "x", {"sytem": "x"}, {"system": 5}, {"options": {"tokenize": 1}}]
)
def test_a_damaged_chat_section_is_refused(pack: Path, tmp_path: Path, chat: Any) -> None:
    copy = Pack.open(pack).copy_to(tmp_path / "pack").path
    raw = json.loads((copy / "pack.json").read_text())
    raw["recipe"]["chat"] = chat
    (copy / "pack.json").write_text(json.dumps(raw))
    with pytest.raises(PackError, match=r"pack\.json"):
        TaskModel.from_pretrained(copy)


def test_a_tokenizer_without_a_template_cannot_serve_such_a_pack(pack: Path) -> None:
    model = TaskModel(tiny_model("llama", vocab_size=260), tokenizer_with(None), Pack.open(pack))
    with pytest.raises(ConfigError, match="no chat template"):
        model.run("item 3")
    with pytest.raises(ConfigError, match="no chat template"):
        adapt((model.model, tokenizer_with(None)), ROWS, recipe=replace(SMALL, chat=BRIEF))


def test_bench_and_tailor_ask_as_the_pack_does(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(pack, tmp_path / "pack")
    head = text_of(prompt_in(TOOLS, BRIEF)).partition("item")[0]
    seen = seen_prompts(monkeypatch)
    options = BenchOptions(("tasc-spec",), rows=2, repeats=1, max_new_tokens=4, memory=False)
    bench_pack(copy, ROWS[:2], options=options)
    tailor(copy, ROWS, config=VocabConfig(head="masked"), own=True)
    measure_here(MemoryJob(str(copy), max_new_tokens=2), ["item 3"])
    asked = [text_of(prompt) for prompt in seen if len(prompt) > 1]
    assert len(asked) > 60
    assert all(text.startswith(head + "item") for text in asked)
    assert Pack.open(copy).chat == BRIEF


def test_inspect_and_enrich_count_answers_behind_such_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tascade.enrich.choose
    import tascade.forecast.inspection

    seen = []
    for module in (tascade.enrich.choose, tascade.forecast.inspection):
        whole = module.prepare

        def watched(*args: Any, whole: Any = whole, **options: Any) -> Any:
            seen.append(whole(*args, **options))
            return seen[-1]

        monkeypatch.setattr(module, "prepare", watched)
    tascade.inspect(ROWS, folder, chat=BRIEF)
    enrich(ROWS, folder, chat=BRIEF, tokens=2)
    assert len(seen) == 2
    for prepared in seen:
        prompts = {text_of(prompt) for prompt, _ in prepared.train}
        assert text_of(prompt_in(TOOLS, BRIEF)) in prompts


def test_tune_learns_behind_such_prompts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tascade.pipeline

    whole, seen = tascade.pipeline.prepare, []

    def only(*args: Any, **options: Any) -> Any:
        seen.append(whole(*args, **options))
        raise InterruptedError

    monkeypatch.setattr(tascade.pipeline, "prepare", only)
    for run in (tascade.pipeline.tune, tascade.pipeline.adapt_tuned):
        with pytest.raises(InterruptedError):
            run(folder, ROWS, out=tmp_path / "out", recipe=replace(SMALL, chat=BRIEF))
    for prepared in seen:
        prompts = {text_of(prompt) for prompt, _ in prepared.train}
        assert text_of(prompt_in(TOOLS, BRIEF)) in prompts


# --- the command line -------------------------------------------------------------------------


def test_flags_are_laid_over_the_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = replace(SMALL, chat=ChatConfig("Speak Dutch.", {"style": "long"}))
    recipe.to_yaml(tmp_path / "recipe.yaml")
    given = json.dumps({"style": "brief", "tools": [WEATHER]})
    words = ["adapt", "--model", str(folder), "--data", str(tmp_path / "rows.jsonl")]
    words += ["--out", str(tmp_path / "pack"), "--recipe", str(tmp_path / "recipe.yaml")]
    words += ["--chat-template-kwargs", given]
    monkeypatch.setattr(sys, "argv", ["tascade", *words])
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert Pack.open(tmp_path / "pack").chat == BRIEF


@pytest.mark.parametrize("text", ["{", "[]", "5", '{"tokenize": true}', '{"a-b": 1}'])
@pytest.mark.parametrize("verb", ["inspect", "enrich", "tune", "adapt"])
def test_flags_that_are_no_variables_are_refused(tmp_path: Path, verb: str, text: str) -> None:
    words = [verb, *(["--data"] if verb == "adapt" else []), "rows", "--model", "m"]
    words += ["--out", str(tmp_path / "out")] if verb in ("adapt", "tune") else []
    done = CliRunner().invoke(cli.app, [*words, "--chat-template-kwargs", text])
    assert isinstance(done.exception, ConfigError), done.output


# --- vLLM's command ---------------------------------------------------------------------------


def test_the_vllm_command_carries_it_all(pack: Path) -> None:
    words = vllm_command(Pack.open(pack), extra=["--max-model-len", "64"])
    kwargs = json.loads(words[words.index("--default-chat-template-kwargs") + 1])
    assert kwargs == {"style": "brief", "tools": [WEATHER]}
    tokenizer = tokenizer_with(words[words.index("--chat-template") + 1])
    for messages in ("hi", [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]):
        # The template brings the system prompt, and no other.
        found = encode_prompt(tokenizer, messages, ChatConfig().over(kwargs))
        assert found.tolist() == encode_prompt(tokenizer_with(TOOLS), messages, BRIEF).tolist()


@pytest.mark.parametrize(
    "word",
    [
        "--default-chat-template-kwargs",
        "--default-chat-template-kwargs={}",
        "--default_chat_template_kwargs",
        "--default-chat-template-kwargs.style",
        "--chat-template",
    ],
)
def test_options_that_would_replace_it_are_refused(pack: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="would replace"):
        vllm_command(Pack.open(pack), extra=[word, "x"])


def test_any_system_prompt_survives_in_a_template() -> None:
    for system in (
        "'",
        '"',
        "'\"",
        "\\",
        "\\n",
        "\n",
        "%}",
        "{{ x }}",
        "{% raw %}",
        "é😀\u2028",
        "#}",
    ):
        made = tokenizer_with(system_template(tokenizer_with(THINKING), ChatConfig(system)))
        found = encode_prompt(made, "hi").tolist()
        assert found == prompt_in(THINKING, ChatConfig(system), "hi")
    with pytest.raises(ConfigError, match="no chat template"):
        system_template(tokenizer_with(None), ChatConfig("x"))
