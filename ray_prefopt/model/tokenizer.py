"""The tokenizer of a run: found, checked, and with the chat template that the config asks for."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import DataError, ModelError
from ray_prefopt.model.hub import why_missing, why_not_loaded


def load_tokenizer(model: ModelConfig, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a pad token; `chat_template` is data.chat_template.

    Raises ModelError when it cannot be loaded or used, DataError when the template cannot be read.
    """
    path = str(model.tokenizer_path)
    revision = model.revision if path == model.path else None
    if missing := why_missing(path, revision, "tokenizer_config.json"):
        raise ModelError(f"the tokenizer of {path}: {missing}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # whatever transformers and tokenizers raise, and the repository's code
        raise ModelError(
            f"the tokenizer of {path} cannot be loaded ({type(error).__name__}: {why_not_loaded(path, error)}): "
            "check its files, or set model.tokenizer to another folder or hub id"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{path} has a slow tokenizer ({type(tokenizer).__name__}): "
            "set model.tokenizer to one that has a tokenizer.json"
        )
    if not tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys():
        # transformers builds the class that belongs to the model, without a vocabulary
        raise ModelError(
            f"{path} has no tokenizer: set model.tokenizer to a folder or hub id with a tokenizer.json"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {path} has neither pad nor EOS token: add one to its files")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    return tokenizer


def _template_text(value: str) -> str:
    """Jinja text as it is, or the text of the file it names."""
    if "{%" in value or "{{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.chat_template {value!r} is neither Jinja text nor a file that can be read ({error}): "
            "give the template itself, or the path of a file with it"
        ) from None
