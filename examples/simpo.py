"""SimPO with the arguments of its document.

    python examples/simpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --beta 2.5 --num_workers 8 --use_gpu --output_dir out

Every other flag is a field of SimPOConfig (docs/migrating-from-trl.md).
"""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from ray.train import ScalingConfig
from transformers import HfArgumentParser

from ray_prefopt import SimPOConfig, SimPOTrainer


@dataclass
class ScriptArguments:
    """What is no field of SimPOConfig."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the model."})
    dataset_name: str = field(metadata={"help": "File, glob, folder, URI or hub id of the pairs."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    num_workers: int = field(default=1, metadata={"help": "Workers on the Ray cluster."})
    use_gpu: bool = field(default=False, metadata={"help": "Give each worker a GPU."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})


def main() -> None:
    script, config = HfArgumentParser((ScriptArguments, SimPOConfig)).parse_args_into_dataclasses()
    is_local = Path(script.dataset_name).exists() or "://" in script.dataset_name
    trainer = SimPOTrainer(
        model=script.model_name_or_path,
        args=config,
        train_dataset=script.dataset_name
        if is_local
        else f"{script.dataset_name}:{script.dataset_train_split}",
        peft_config=LoraConfig(r=script.lora_r, target_modules="all-linear") if script.use_peft else None,
        scaling_config=ScalingConfig(num_workers=script.num_workers, use_gpu=script.use_gpu),
    )
    output = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    print(
        f"{output.global_step} steps, mean loss {output.training_loss:.4f}; the model is in {config.output_dir}"
    )


if __name__ == "__main__":
    main()
