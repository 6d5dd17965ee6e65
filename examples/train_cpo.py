"""The quick start of TRL's document about CPO: only the import is another.

    python examples/train_cpo.py [MODEL] [PAIRS]

Without arguments it takes the model and the pairs of the document from the Hub.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_prefopt import CPOConfig, CPOTrainer

MODEL, PAIRS = [
    *sys.argv[1:],
    *["Qwen/Qwen2-0.5B-Instruct", "trl-lib/ultrafeedback_binarized"][len(sys.argv) - 1 :],
]


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if PAIRS.endswith(".jsonl"):
        train_dataset = load_dataset("json", data_files=PAIRS, split="train")
    else:
        train_dataset = load_dataset(PAIRS, split="train")

    training_args = CPOConfig(output_dir="Qwen2-0.5B-CPO")
    trainer = CPOTrainer(
        model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset
    )
    trainer.train()


if __name__ == "__main__":
    main()
