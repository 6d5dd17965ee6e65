"""Tokenizers and models that are built in milliseconds, without network, and are the same every time.

Import it as `from tests.tiny import ...`: pytest runs with the repository root on its path.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec.core import url_to_fs
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

from ray_prefopt.data.blocks import (
    FORMAT,
    Lengths,
    encode,
    encode_block,
    file_entry,
    write_manifest,
)
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.storage import write_file

CORPUS = [
    "The sky is blue. The sky is black. The grass is green, and the sun is in the sky.",
    "What color is the sky? It is blue. Where is the sun? In the sky.",
    "two plus two is four; two plus two is five; twofold, fourteen, fiveteen, hello, helloing, help",
    "import numpy as np\n\ndef answer(x):\n    return x + 1\n",
    "äöü ß é ñ 你好 世界 🙂 naïve café Straße",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{% for message in messages %}{% set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}"
    "{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

CHATS: dict[str, dict[str, Any]] = {
    "plain": {"eos": "<|endoftext|>", "pad": "<|endoftext|>"},
    "bos": {"bos": "<s>", "eos": "</s>", "pad": "</s>"},
    "chatml": {"eos": "<|im_end|>", "pad": "<|endoftext|>", "special": ["<|im_start|>"], "template": CHATML},
    "qwen": {
        "eos": "<|im_end|>",
        "pad": "<|endoftext|>",
        "special": ["<|im_start|>"],
        "template": CHATML_WITH_DEFAULT_SYSTEM,
    },
    "llama3": {
        "bos": "<|begin_of_text|>",
        "eos": "<|end_of_text|>",
        "pad": "<|end_of_text|>",
        "special": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "template": LLAMA3,
    },
    "gemma": {
        "bos": "<bos>",
        "eos": "<eos>",
        "pad": "<pad>",
        "special": ["<start_of_turn>", "<end_of_turn>"],
        "template": GEMMA,
    },
    "mistral": {
        "bos": "<s>",
        "eos": "</s>",
        "pad": "</s>",
        "special": ["[INST]", "[/INST]"],
        "template": MISTRAL,
    },
}
"""The kinds of `tiny_tokenizer`: special tokens and chat template by family."""


def tiny_tokenizer(kind: str = "chatml", *, template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 420 tokens that spells any text, with the special tokens of a family."""
    chat = CHATS[kind]
    special = [chat["eos"], *([chat["bos"]] if "bos" in chat else []), chat["pad"], *chat.get("special", [])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=chat.get("bos"),
        eos_token=chat["eos"],
        pad_token=chat["pad"],
        extra_special_tokens=chat.get("special", []),
        clean_up_tokenization_spaces=False,
    )
    assert tokenizer.convert_tokens_to_ids(special).count(None) == 0
    tokenizer.chat_template = template or chat.get("template")
    return tokenizer


@cache
def _trained() -> str:
    """In the form of Qwen2: transformers builds that anyway for a folder with a Qwen2 model."""
    form = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = form.normalizer, form.pre_tokenizer
    tokenizer.decoder = form.decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    return str(tokenizer.to_str())


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer of some 80 tokens in the form of T5's: EOS after a text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = T5Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS * 2, trainer)
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in pieces], extra_ids=0)


def tiny_bart_tokenizer() -> RobertaTokenizer:
    """The byte-level BPE of `tiny_tokenizer` in the form of BART's: BOS before a text, EOS after it."""
    trained = json.loads(_trained())["model"]
    tokens = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *trained["vocab"]])
    return RobertaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in trained["merges"]],
    )


ENCODER_DECODERS = {"t5": tiny_t5_tokenizer, "bart": tiny_bart_tokenizer}
"""Architectures of an encoder and a decoder, with what makes their tokenizers."""


def merge_tokenizer(
    letters: str, merges: Sequence[tuple[str, str]], **special: str
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of these letters and merges, first merge first; for splits that are worked out by hand."""
    tokens = [*letters, *dict.fromkeys(one + other for one, other in merges)]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), **special)


_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 32,
        "max_position_embeddings": 512,
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
        "dropout": 0.0,
    },
}


def tiny_config(model_type: str = "qwen2", **overrides: Any) -> dict[str, Any]:
    """`model.from_config` of a model with some 50 thousand weights: qwen2, llama, gemma2, gpt2, t5, bart, ..."""
    shape = _SHAPES.get(model_type, _SHAPE)
    return {"model_type": model_type, "vocab_size": 512, **shape, **overrides}


def tiny_model(model_type: str = "qwen2", *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """That model in fp32, in evaluation mode, with weights that depend on the seed alone."""
    settings = tiny_config(model_type, **overrides)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.float32)
    return model.eval()


def save_tiny_model(
    folder: str | Path, kind: str = "qwen2", *, chat: str = "chatml", seed: int = 0, **overrides: Any
) -> str:
    """Write a Hugging Face folder with that model and its tokenizer, or that of a chat family; returns its path."""
    tokenizer = ENCODER_DECODERS[kind]() if kind in ENCODER_DECODERS else tiny_tokenizer(chat)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(kind, seed=seed, **ids, pad_token_id=tokenizer.pad_token_id, **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def chat_row(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A conversational row with an explicit prompt."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def random_pairs(count: int, *, vocabulary: int = 400, seed: int = 0) -> list[TokenizedPair]:
    """Pairs of random ids and of very different lengths: prompts of 1 to 20 tokens, completions of 1 to 30."""
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return rng.integers(0, vocabulary, rng.integers(1, longest + 1)).tolist()

    def pair(prompt: list[int]) -> TokenizedPair:
        return TokenizedPair(prompt + ids(30), prompt + ids(30), len(prompt), len(prompt))

    return [pair(ids(20)) for _ in range(count)]


def write_blocks(folder: str | Path, pairs: Sequence[TokenizedPair], *, rows: int = 16) -> str:
    """Write the pairs as prepared blocks of so many rows each, without Ray; returns the folder."""
    fs, path = url_to_fs(str(folder))

    def put(name: str, count: int, data: bytes) -> dict[str, Any]:
        write_file(fs, f"{path}/{name}", data)
        return file_entry(name, count, data)

    parts = [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
    blocks = [put(f"try/{i:04}.parquet", len(part), encode_block(part)) for i, part in enumerate(parts)]
    lengths = put("try/lengths.parquet", len(pairs), encode(Lengths.of(pairs).to_table()))
    manifest = {"format": FORMAT, "fingerprint": "f", "attempt": "try", "blocks": blocks, "lengths": lengths}
    write_manifest(str(folder), manifest)
    return str(folder)
