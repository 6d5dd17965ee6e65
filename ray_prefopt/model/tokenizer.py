"""The tokenizer of a run: found, checked, and with the chat template that the config asks for."""

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import DataError, ModelError


def load_tokenizer(model: ModelConfig, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a pad token; `chat_template` is data.chat_template.

    Raises ModelError when it cannot be loaded or used, DataError when the template cannot be read.
    """
    path = str(model.tokenizer_path)
    revision = model.revision if path == model.path else None
    try:
        _find(path, revision)
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=model.trust_remote_code
        )
    except (
        Exception
    ) as error:  # whatever transformers, tokenizers and huggingface_hub raise, and the repository's code
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise ModelError(
            f"the tokenizer of {path} cannot be loaded ({type(error).__name__}: {reason}): check model.path or "
            "model.tokenizer, log in if the model is gated, and read model.trust_remote_code if it brings code"
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


def _find(path: str, revision: str | None) -> None:
    """Ask the Hub once whether it has the model: loading would ask for a minute when it cannot be reached."""
    if Path(path).exists():
        return
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise FileNotFoundError("no such folder")
    if not constants.HF_HUB_OFFLINE and not isinstance(
        try_to_load_from_cache(path, "tokenizer_config.json", revision=revision), str
    ):
        HfApi().model_info(path, revision=revision, timeout=10)


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
