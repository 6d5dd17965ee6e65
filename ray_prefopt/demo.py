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

from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.model.hub import without_bars
from ray_prefopt.settings import dump_yaml
from ray_prefopt.training.plots import plot_run
from ray_prefopt.training.run import train

THINGS = (
    "atom", "germ", "flea", "ant", "bee", "mouse", "rat", "rabbit", "cat", "fox", "wolf", "lion", "bear",
    "horse", "hippo", "elephant", "whale", "castle", "hill", "mountain", "desert", "moon", "earth", "sun",
    "galaxy", "universe",
)  # fmt: skip
"""From small to big."""

QUESTIONS = (
    "Which is {more}, the {one} or the {other}?",
    "What is {more}: the {one} or the {other}?",
    "Of the {one} and the {other}, which is {more}?",
)
ANSWER = "The {winner} is {more} than the {loser}."
HELD_OUT = 0.1
"""Share of the pairs of things that training never sees."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Padding, start and end of a turn: the first ids of the vocabulary."""
VOCABULARY = 512
CONFIG = "demo.yaml"
ACCURACY = "eval_rewards/accuracies"

Row = dict[str, Any]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and made."""

    accuracy_before: float
    """Share of held-out pairs whose chosen answer has the higher reward; a coin gives 0.5."""
    accuracy_after: float
    answers_right: float
    """Share of held-out questions that the trained model answers with the chosen sentence, word for word."""
    picture: str
    model: str
    """Hugging Face folder."""
    config: str
    """`ray-prefopt train -c` of this file is the same run."""
    seconds: float


def run_demo(folder: str | Path = "demo") -> DemoResult:
    """Make pairs, a tokenizer and a tiny model in `folder`, train it on two workers, and ask it questions.

    What an earlier demo left there is replaced. Raises ConfigError when the folder holds anything else.
    """
    started = time.perf_counter()
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    folder = claim_folder(Path(folder).absolute())
    learned, held_out = preference_rows(seed=0)
    write_rows(folder / "train.jsonl", learned)
    write_rows(folder / "eval.jsonl", held_out)
    make_tokenizer([text for row in learned for text in texts(row)]).save_pretrained(folder / "tokenizer")
    config = demo_config(folder)
    (folder / CONFIG).write_text(dump_yaml(config))
    console.print(f"{len(learned):,} preference pairs to learn from, such as")
    for name, text in zip(("prompt", "chosen", "rejected"), texts(learned[0]), strict=True):
        console.print(f"  {name:<9} {text}")
    console.print(f"and {len(held_out):,} held-out ones, about two things that never meet in training")

    result = train(config)
    before, *_, after = _accuracies(Path(result.folder))
    assert result.model is not None
    questions = [texts(row)[0] for row in held_out]
    answers = ask(result.model, questions)
    right = [answer == texts(row)[1] for answer, row in zip(answers, held_out, strict=True)]
    console.print(f"held-out pairs ranked right       {before:6.1%} before, {after:.1%} after")
    console.print(f"held-out questions answered right {sum(right) / len(right):6.1%}, word for word, such as")
    for question, answer in list(zip(questions, answers, strict=True))[:3]:
        console.print(f"  {question}  {answer}")
    return DemoResult(
        accuracy_before=round(before, 4),
        accuracy_after=round(after, 4),
        answers_right=round(sum(right) / len(right), 4),
        picture=str(plot_run(result.folder, folder / "curves.png")),
        model=result.model,
        config=str(folder / CONFIG),
        seconds=round(time.perf_counter() - started, 1),
    )


def _accuracies(run: Path) -> list[float]:
    """Held-out reward accuracy at each evaluation of a run, the untrained model first."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[ACCURACY] for record in records if ACCURACY in record]


def claim_folder(folder: Path) -> Path:
    """The folder, made if need be, and without the run of an earlier demo."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give the demo another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise ConfigError(
            f"{folder} is not empty and holds no earlier demo ({CONFIG} is missing): give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("demo", "blocks"):
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    return folder


# --- The pairs ---


def preference_rows(*, seed: int, hidden_share: float = HELD_OUT) -> tuple[list[Row], list[Row]]:
    """Conversational rows for training, and held-out ones about pairs of things that are in no row for training.

    Neighbours in size are never held out: the order of any other two follows from the pairs that training sees.
    """
    rng = random.Random(seed)
    meetings = list(combinations(range(len(THINGS)), 2))
    inferable = [meeting for meeting in meetings if meeting[1] - meeting[0] > 1]
    hidden = set(rng.sample(inferable, round(hidden_share * len(meetings))))
    held_out, learned = (
        [row for small, big in part for row in _rows(THINGS[small], THINGS[big])]
        for part in (sorted(hidden), sorted(set(meetings) - hidden))
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


def texts(row: Row) -> tuple[str, str, str]:
    """Question, chosen and rejected answer."""
    prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
    return prompt, chosen, rejected


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- The tokenizer and the model ---


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the form of Qwen2's, learned from these texts, with a ChatML template."""
    form = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = form.normalizer, form.pre_tokenizer
    tokenizer.decoder = form.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, start, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens=[start],
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
                    "initializer_range": 0.06,
                    "pad_token_id": 0,
                    "eos_token_id": 2,
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
            "loss": {"kind": "cpo_simpo", "beta": 1.0, "gamma_beta_ratio": 0.5, "cpo_alpha": 1.0},
            "optim": {"learning_rate": 3e-3, "weight_decay": 0.01},
            "engine": {"kind": "zero", "zero_stage": 2},
            "run": {
                "name": "demo",
                "storage_path": str(folder / "runs"),
                "num_workers": 2,
                "global_batch": 32,
                "micro_batch": 16,
                "epochs": 2,
                "log_steps": 10,
                "eval_steps": 44,
                "eval_on_start": True,
            },
        }
    )


def ask(model_folder: str, questions: Sequence[str]) -> list[str]:
    """The answers of a model in a Hugging Face folder, without sampling."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    prompts = [[{"role": "user", "content": question}] for question in questions]
    inputs: Any = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
