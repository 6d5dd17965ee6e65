"""Preference training from nothing, offline, in minutes: `ray-prefopt demo`.

A language model that has never read a sentence is shown pairs of answers to questions such as "Which is bigger, the
cat or the whale?". Chosen and rejected hold the same words and differ in which thing comes first, so that neither
length nor a word gives the answer away: the model has to find the order of things by itself. The held-out questions
are about pairs of things that never meet in training.
"""

import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.settings import dump_yaml
from ray_prefopt.train.plots import plot_run
from ray_prefopt.train.run import train

THINGS = tuple(
    ["atom", "germ", "flea", "ant", "bee", "mouse", "rat", "rabbit", "cat", "fox", "wolf", "lion", "bear", "horse", "hippo", "elephant", "whale", "castle", "hill", "mountain", "desert", "moon", "earth", "sun", "galaxy", "universe"]
)
"""From small to big."""

QUESTIONS = (
    "Which is {more}, the {one} or the {other}?",
    "What is {more}: the {one} or the {other}?",
    "Of the {one} and the {other}, which is {more}?",
)
ANSWER = "The {winner} is {more} than the {loser}."
HELD_OUT = 0.2
"""Share of the pairs of things that training never sees."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 512
CONFIG = "config.yaml"

Row = dict[str, Any]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and made."""

    accuracy_before: float
    """Share of held-out pairs whose chosen answer the model prefers; a coin gives 0.5."""
    accuracy_after: float
    answers_correct: float
    """Share of held-out questions that the trained model answers with the right sentence, word for word."""
    question: str
    answer: str
    """What the trained model says to a held-out question."""
    picture: str
    model: str
    """Hugging Face folder."""
    config: str
    """`ray-prefopt train -c` of this file is the same run."""
    seconds: float


def run_demo(folder: str | Path = "demo") -> DemoResult:
    """Make pairs, a tokenizer and a tiny model in `folder`, train it on two workers, and ask it a question.

    What an earlier demo left there is replaced. Raises ConfigError when the folder holds anything else.
    """
    started = time.perf_counter()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    folder = _claim(Path(folder).absolute())
    learned, held_out = preference_rows(seed=0)
    _write_rows(folder / "train.jsonl", learned)
    _write_rows(folder / "eval.jsonl", held_out)
    make_tokenizer([text for row in learned for text in _texts(row)]).save_pretrained(folder / "tokenizer")
    config = demo_config(folder)
    (folder / CONFIG).write_text(dump_yaml(config))
    example = learned[0]
    console.print(
        f"{len(learned):,} preference pairs, and {len(held_out)} held-out ones about pairs of things never seen together:"
    )
    for name, text in zip(("prompt", "chosen", "rejected"), _texts(example), strict=True):
        console.print(f"  {name:<9} {text}")

    result = train(config)
    records = [json.loads(line) for line in Path(result.folder, "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [record[ACCURACY] for record in records if ACCURACY in record]
    picture = plot_run(result.folder, folder / "curves.png")
    assert result.model is not None
    questions = [_texts(row) for row in held_out]
    answers = ask(result.model, [question for question, _, _ in questions])
    correct = sum(answer == chosen for answer, (_, chosen, _) in zip(answers, questions, strict=True)) / len(
        answers
    )
    console.print(f"held-out reward accuracy  {before:.3f} before, {after:.3f} after {result.steps} steps")
    console.print(f"held-out answers right    {correct:.3f}, word for word; three of them:")
    for (question, _, _), answer in list(zip(questions, answers, strict=True))[:3]:
        console.print(f"  {question}  [bold]{answer}[/bold]")
    return DemoResult(
        accuracy_before=round(before, 4),
        accuracy_after=round(after, 4),
        answers_correct=round(correct, 4),
        question=questions[0][0],
        answer=answers[0],
        picture=str(picture),
        model=result.model,
        config=str(folder / CONFIG),
        seconds=round(time.perf_counter() - started, 1),
    )


ACCURACY = "eval_rewards/accuracies"


def _claim(folder: Path) -> Path:
    """The folder, without the run and blocks of an earlier demo."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give the demo another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise ConfigError(
            f"{folder} is not empty and holds no earlier demo ({CONFIG} is missing): give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return folder


# --- The pairs ---


def preference_rows(*, seed: int) -> tuple[list[Row], list[Row]]:
    """Conversational rows for training, and held-out ones about pairs of things that are in no row for training."""
    meetings = list(combinations(THINGS, 2))
    rng = random.Random(seed)
    rng.shuffle(meetings)
    num_held_out = round(HELD_OUT * len(meetings))
    held_out, learned = (
        [row for small, big in part for row in _rows(small, big)]
        for part in (meetings[:num_held_out], meetings[num_held_out:])
    )
    rng.shuffle(held_out)
    rng.shuffle(learned)
    return learned, held_out


def _rows(small: str, big: str) -> list[Row]:
    """Every question about two things, in both orders."""
    return [
        _row(
            question.format(more=more, one=one, other=other),
            ANSWER.format(more=more, winner=winner, loser=loser),
            ANSWER.format(more=more, winner=loser, loser=winner),
        )
        for question in QUESTIONS
        for one, other in ((small, big), (big, small))
        for more, winner, loser in (("bigger", big, small), ("smaller", small, big))
    ]


def _row(question: str, chosen: str, rejected: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _texts(row: Row) -> tuple[str, str, str]:
    """Question, chosen and rejected answer."""
    prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
    return prompt, chosen, rejected


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- The tokenizer and the model ---


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the form of Qwen2's, learned from these texts, with a ChatML template."""
    form = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = form.normalizer, form.pre_tokenizer
    tokenizer.decoder = form.decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 8, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def demo_config(folder: Path) -> TrainConfig:
    """CPO-SimPO on a two-layer Qwen2 with random weights, two workers, ZeRO-2."""
    return TrainConfig.model_validate(
        {
            "model": {
                "from_config": {
                    "model_type": "qwen2",
                    "vocab_size": VOCABULARY,
                    "hidden_size": 128,
                    "intermediate_size": 256,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 128,
                },
                "tokenizer": str(folder / "tokenizer"),
                "dtype": "float32",
            },
            "data": {
                "train": str(folder / "train.jsonl"),
                "eval": str(folder / "eval.jsonl"),
                "max_length": 128,
                "max_prompt_length": 64,
            },
            "loss": {"kind": "cpo_simpo", "beta": 2.0, "gamma_beta_ratio": 0.5, "cpo_alpha": 1.0},
            "optim": {"learning_rate": 3e-3, "weight_decay": 0.01},
            "engine": {"kind": "zero", "zero_stage": 2},
            "run": {
                "name": "demo",
                "storage_path": str(folder / "runs"),
                "num_workers": 2,
                "global_batch": 64,
                "micro_batch": 32,
                "epochs": 6,
                "log_steps": 10,
                "eval_steps": 50,
                "eval_on_start": True,
            },
        }
    )


def ask(model_folder: str, questions: Sequence[str]) -> list[str]:
    """The answers of a model in a Hugging Face folder, without sampling."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompts = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
