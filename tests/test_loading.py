"""Loading a model: damaged files, missing weights, wrappers, and sizes that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tascade
from tascade import bundled
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.errors import ConfigError, UnsupportedModelError
from tascade.load import check_files, load_model
from tascade.model import TaskModel
from tascade.tailor.offload.load import load_offloaded
from tascade.testing import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"p{i}", "completion": f"answer {i % 3}"} for i in range(4)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model of a user's, in a folder."""
    out = tmp_path / "model"
    tiny_model("llama", 1, vocab_size=260).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    return out


def test_a_sound_folder_is_loaded(folder: Path) -> None:
    check_files(str(folder))
    check_files(str(bundled.model_path()))
    load_model(folder)


@pytest.fixture(params=[load_model, load_offloaded])
def load(request: pytest.FixtureRequest) -> Any:
    """Both ways in: whole, and without the vocabulary tables."""
    return request.param


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_called_one(load: Any, folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    with pytest.raises(ConfigError, match="git lfs pull") as said:
        load(folder)
    assert name in str(said.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: b"PK\x03\x04" + data,
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"{" * 40 + data[48:],
    ],
)
def test_a_damaged_file_of_weights_is_named(load: Any, folder: Path, damage: Any) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"model\.safetensors.*damaged"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_damaged_json_file_is_named(load: Any, folder: Path, name: str) -> None:
    (folder / name).write_text('{"half": ')
    with pytest.raises(ConfigError, match=name):
        load(folder)


@pytest.mark.parametrize(
    "lost",
    ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"],
)
def test_missing_weights_are_named_not_made_up(load: Any, folder: Path, lost: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights[lost]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises((ConfigError, UnsupportedModelError), match=lost):
        load(folder)


def test_weights_of_another_shape_are_named(load: Any, folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"cannot load|lacks weights"):
        load(folder)


def test_a_tied_model_lacks_nothing(tmp_path: Path) -> None:
    tiny_model("llama", 1, vocab_size=260, tie_word_embeddings=True).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    load_model(tmp_path)
    shutil.rmtree(tmp_path)


# --- wrappers -------------------------------------------------------------------------------------


def test_wrappers_are_named_with_the_call_that_helps() -> None:
    model, tokenizer = tiny_model("llama", 1, vocab_size=260), byte_tokenizer()
    for wrapped, call in (
        (torch.compile(model), "_orig_mod"),
        (torch.nn.DataParallel(model), "model.module"),
    ):
        with pytest.raises(UnsupportedModelError, match=call):
            tascade.adapt((wrapped, tokenizer), ROWS)


def test_an_adapter_is_named_with_the_call_that_helps() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model("llama", 1, vocab_size=260), config)
    with pytest.raises(UnsupportedModelError, match=r"merge_and_unload\(\)"):
        tascade.adapt((wrapped, byte_tokenizer()), ROWS)


# --- three sizes ----------------------------------------------------------------------------------


def test_a_padded_embedding_is_read_to_its_end_and_no_further() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", 1, vocab_size=len(tokenizer) + 40)
    task_model = tascade.adapt((model, tokenizer), ROWS)
    last = model.config.vocab_size - 1
    decoder, params = task_model.decoder, task_model.params(max_new_tokens=4)
    assert decoder.generate([65, last], params).tokens
    for ids in ([65, last + 1], [-1, 65]):
        with pytest.raises(ConfigError, match="no row for a token"):
            decoder.generate(ids, params)
        batch = BatchDecoder(BatchTarget(model), tokenizer=tokenizer)
        with pytest.raises(ConfigError, match="no row for a token"):
            batch.generate([[65], ids], params)


def test_tokens_that_the_model_has_no_row_for_are_warned_of_and_refused() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", 1, vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<tool>"])
    with pytest.warns(UserWarning, match="<tool>"):
        task_model = tascade.adapt((model, tokenizer), ROWS)
    assert task_model.generate("plain", max_new_tokens=3) is not None
    with pytest.raises(ConfigError, match="no row for a token"):
        task_model.generate("with <tool>", max_new_tokens=3)


def test_a_pack_is_no_model_and_names_its_own(folder: Path, tmp_path: Path) -> None:
    made = tascade.adapt(folder, ROWS, out=tmp_path / "pack", max_new_tokens=4)
    for call in (
        lambda: load_model(tmp_path / "pack"),
        lambda: tascade.adapt(str(tmp_path / "pack"), ROWS),
        lambda: tascade.inspect(ROWS * 9, tmp_path / "pack"),
    ):
        with pytest.raises(ConfigError, match="this is a pack, and no model") as raised:
            call()
        assert raised.value.fix == f"give {made.pack.info.model}"
    (tmp_path / "pack" / "pack.json").write_text("[")
    with pytest.raises(ConfigError, match="no model") as raised:
        load_model(tmp_path / "pack")
    assert "folder or hub id" in raised.value.fix


def test_a_path_that_is_not_there_is_refused_at_once_with_what_is_near(folder: Path) -> None:
    typo = folder.with_name("modle")
    with pytest.raises(ConfigError, match="no such folder") as raised:
        load_model(typo)
    assert str(folder) in str(raised.value)
    for name in ("./nowhere-near/anything", "models/of/mine"):
        with pytest.raises(ConfigError, match="check the path"):
            load_model(name)


def test_a_folder_without_a_model_is_refused_with_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("")
    with pytest.raises(ConfigError, match="no model in this folder") as raised:
        load_model(tmp_path)
    assert raised.value.got == "report.html"


def test_a_name_that_a_folder_here_nearly_has_is_told_of_before_the_hub_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder.parent)
    (folder.parent / "own").mkdir()
    folder.rename(folder.parent / "own" / "model-1")
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_model("own/model")
    assert "no folder own/model here: the hub is asked; did you mean own/model-1?" in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_a_bare_name_that_a_folder_here_nearly_has_is_no_hub_id_unless_one_was_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """The hub is asked for minutes where there is no network."""
    asked: list[str] = []

    def in_cache(name: str, file: str) -> str | None:
        asked.append(name)
        return "there" if cached else None

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", in_cache)
    monkeypatch.chdir(folder.parent)
    typo = folder.name[:-1]
    with pytest.raises(ConfigError) as raised:
        load_model(typo)
    assert asked == [typo]
    assert ("cannot load the model" in str(raised.value)) == cached
    assert (f"did you mean {folder.name}? A hub id" in str(raised.value)) != cached


def test_a_pack_is_opened_in_the_precision_it_was_made_in(
    ticket_pack: Path, tmp_path: Path
) -> None:
    # Measured and compared with plain decoding in one precision, it may say other words in another.
    made = tmp_path / "pack"
    shutil.copytree(ticket_pack, made)
    for said, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        read = json.loads((made / "pack.json").read_text())
        read["recipe"]["dtype"] = said
        (made / "pack.json").write_text(json.dumps(read))
        assert TaskModel.from_pretrained(made).model.dtype == dtype
        assert TaskModel.from_pretrained(made, dtype="float16").model.dtype == torch.float16
