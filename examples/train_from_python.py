"""Train from Python, and talk to the result: `python examples/train_from_python.py`, from the repository's root.

Offline and small, like examples/quickstart.yaml.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_prefopt import TrainConfig, TrainResult, train

NEW_MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def main(storage_path: str = "runs", max_steps: int | None = None) -> TrainResult:
    config = TrainConfig.model_validate(
        {
            "model": {"from_config": NEW_MODEL, "tokenizer": "examples/tokenizer", "dtype": "float32"},
            "data": {
                "train": "examples/pairs.jsonl",
                "eval": {"facts": "examples/held_out.jsonl", "chat": "examples/chat.jsonl"},
                "max_length": 256,
                "max_prompt_length": 128,
            },
            "loss": {"kind": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.55},
            "optim": {"learning_rate": 3e-3},
            "run": {
                "name": "from-python",
                "storage_path": storage_path,
                "global_batch": 8,
                "micro_batch": 8,
                "epochs": 3,
                "max_steps": max_steps,
            },
        }
    )
    result = train(config)  # the same call again returns this result, or resumes a run that did not finish
    for name in ("eval_facts_rewards/accuracies", "eval_chat_rewards/accuracies"):
        print(f"{name}: {result.metrics[name]:.2f}")

    tokenizer = AutoTokenizer.from_pretrained(result.model)
    model = AutoModelForCausalLM.from_pretrained(result.model)
    inputs = tokenizer("What do bees make? ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    print(repr(tokenizer.decode(output[0])))
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
