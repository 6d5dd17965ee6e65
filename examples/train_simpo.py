"""The example of the SimPO document: only the import is another.

python examples/train_simpo.py [MODEL]
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_prefopt import SimPOConfig, SimPOTrainer

MODEL = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2-0.5B-Instruct"

simpo_dataset_dict = {
    "prompt": [
        "hello",
        "how are you",
        "What is your name?",
        "What is your name?",
        "Which is the best programming language?",
        "Which is the best programming language?",
        "Which is the best programming language?",
    ],
    "chosen": [
        "hi nice to meet you",
        "I am fine",
        "My name is Mary",
        "My name is Mary",
        "Python",
        "Python",
        "Java",
    ],
    "rejected": [
        "leave me alone",
        "I am not fine",
        "Whats it to you?",
        "I dont have a name",
        "Javascript",
        "C++",
        "C++",
    ],
}


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train_dataset = Dataset.from_dict(simpo_dataset_dict)

    simpo_config = SimPOConfig(
        beta=2.5,  # beta
        gamma_beta_ratio=0.25,  # ratio between target reward margin (gamma) and beta
    )
    simpo_trainer = SimPOTrainer(
        model,
        args=simpo_config,
        train_dataset=train_dataset,
        tokenizer=tokenizer,
    )
    simpo_trainer.train()


if __name__ == "__main__":
    main()
