"""Tokenizers of runs: pad token, chat template, and the sentence for each that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import DataError, ModelError
from ray_prefopt.model.tokenizer import load_tokenizer
from tests.tiny import CHATML, save_tiny_model, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "sky?"}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and the tokenizer of ChatML."""
    return Path(save_tiny_model(tmp_path_factory.mktemp("model")))


def words(folder: Path, **special: str) -> str:
    """A folder with a tokenizer of a few words and these special tokens; returns its path."""
    vocabulary = {word: index for index, word in enumerate(["blue", "green", *special.values()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="blue"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def test_the_tokenizer_is_that_of_the_folder(saved: Path) -> None:
    found, expected = load_tokenizer(ModelConfig(path=str(saved))), tiny_tokenizer()
    for text in ("What color is the sky?", "<|im_start|>user\nsky?<|im_end|>\n", "你好 🙂", " \n\n  x"):
        assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert (found.pad_token, found.eos_token, found.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert found.chat_template == CHATML


def test_a_tokenizer_of_its_own_comes_first(saved: Path, tmp_path: Path) -> None:
    other = words(tmp_path, eos_token="</s>")
    found = load_tokenizer(ModelConfig(path=str(saved), tokenizer=other))
    assert found("green")["input_ids"] == [1]


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
        ({"eos_token": "</s>"}, "</s>"),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, "</s>"),
        ({"pad_token": "<pad>"}, "<pad>"),
    ],
)
def test_the_pad_token_is_its_own_or_the_eos(tmp_path: Path, special: dict[str, str], pad: str) -> None:
    assert load_tokenizer(ModelConfig(path=words(tmp_path, **special))).pad_token == pad


# --- chat templates ---


def test_a_template_may_be_jinja_text(saved: Path) -> None:
    found = load_tokenizer(ModelConfig(path=str(saved)), "{{ messages[0]['content'] }}!")
    assert found.apply_chat_template(MESSAGES, tokenize=False) == "sky?!"


def test_a_template_may_be_a_file(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['role'] }}: ü", encoding="utf-8")
    found = load_tokenizer(ModelConfig(path=str(saved)), str(file))
    assert found.apply_chat_template(MESSAGES, tokenize=False) == "user: ü"


def latin_1(folder: Path) -> str:
    (folder / "template.jinja").write_bytes("ü".encode("latin-1"))
    return str(folder / "template.jinja")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (lambda folder: f"{folder}/nowhere.jinja", "No such file or directory"),
        (str, "Is a directory"),
        (latin_1, "can't decode byte 0xfc"),
        (lambda _: "just some words", "No such file or directory"),
        (lambda _: "words\0", "null byte"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(
    saved: Path, tmp_path: Path, template: Callable[[Path], str], reason: str
) -> None:
    value = template(tmp_path)
    with pytest.raises(DataError) as caught:
        load_tokenizer(ModelConfig(path=str(saved)), value)
    message = str(caught.value)
    assert message.startswith(
        f"data.chat_template {value!r} is neither Jinja text nor a file that can be read ("
    )
    assert reason in message
    assert message.endswith("): give the template itself, or the path of a file with it")


# --- refusals ---


def test_a_folder_that_does_not_exist_is_refused(saved: Path) -> None:
    for model in (ModelConfig(path="./here"), ModelConfig(path=str(saved), tokenizer="./here")):
        with pytest.raises(ModelError) as caught:
            load_tokenizer(model)
        assert str(caught.value) == "the tokenizer of ./here: no such folder, and not a hub id (org/name)"


def test_offline_only_the_cache_is_asked() -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(path="org/name"))
    assert str(caught.value).startswith(
        "the tokenizer of org/name cannot be loaded (OSError: We couldn't connect to 'https://huggingface.co' to load"
    )
    assert str(caught.value).endswith(
        "): check its files, or set model.tokenizer to another folder or hub id"
    )


def test_a_folder_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^the tokenizer of {tmp_path} cannot be loaded \(ValueError: "):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_damaged_file_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text('{"model": ')
    with pytest.raises(
        ModelError, match=r"cannot be loaded \(JSONDecodeError: Expecting value: line 1 column 11"
    ):
        load_tokenizer(ModelConfig(path=str(tmp_path / "model")))


def test_a_model_without_tokenizer_is_refused(saved: Path, tmp_path: Path) -> None:
    """transformers would build Qwen2's tokenizer for it, with special tokens and nothing else."""
    shutil.copytree(saved, tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / file).unlink()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path / "model")))
    assert str(caught.value) == (
        f"{tmp_path}/model has no tokenizer: set model.tokenizer to a folder or hub id with a tokenizer.json"
    )


def test_code_of_a_tokenizer_is_not_run_unless_trusted(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenization_own.py").write_text("raise RuntimeError('the code was run')\n")
    with pytest.raises(ModelError, match=r"trust_remote_code") as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert "was run" not in str(caught.value)


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    settings = {"tokenizer_class": "ByT5Tokenizer"}  # bytes, in Python
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert str(caught.value) == (
        f"{tmp_path} has a slow tokenizer (ByT5Tokenizer): set model.tokenizer to one that has a tokenizer.json"
    )


def test_a_tokenizer_without_pad_and_eos_is_refused(tmp_path: Path) -> None:
    path = words(tmp_path, unk_token="<unk>")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(path=path))
    assert str(caught.value) == f"the tokenizer of {path} has neither pad nor EOS token: add one to its files"
