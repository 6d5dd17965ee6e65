"""CPOConfig and SimPOConfig are what scripts and command lines written for TRL expect."""

import dataclasses
import warnings

import pytest
from transformers import HfArgumentParser
from trl.experimental.cpo import CPOConfig as TrlConfig

from ray_prefopt.compat.config import CPOConfig, SimPOConfig


def test_cpo_config_has_the_defaults_of_trl() -> None:
    ours = {field.name: field for field in dataclasses.fields(CPOConfig)}
    for theirs in dataclasses.fields(TrlConfig):
        field = ours[theirs.name]
        assert (field.default, field.default_factory) == (theirs.default, theirs.default_factory), theirs.name
        assert field.metadata.get("choices") == theirs.metadata.get("choices"), theirs.name


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)  # of trl's own default
def test_unset_arguments_become_what_they_become_in_trl() -> None:
    theirs, ours = TrlConfig(output_dir="out", use_cpu=True), CPOConfig(output_dir="out", use_cpu=True)
    differing = {
        field.name
        for field in dataclasses.fields(TrlConfig)
        if getattr(theirs, field.name) != getattr(ours, field.name)
    }
    assert differing == set()
    assert (ours.bf16, ours.gradient_checkpointing, ours.learning_rate, ours.logging_steps) == (
        True,
        True,
        1e-6,
        10,
    )


def test_names_that_trl_has_dropped_have_the_defaults_of_its_document() -> None:
    args = CPOConfig()
    assert (args.max_prompt_length, args.truncation_mode) == (512, "keep_end")
    assert (args.label_pad_token_id, args.padding_value) == (-100, None)
    assert (args.warmup_ratio, args.save_safetensors, args.ray_scope, args.past_index) == (
        0.0,
        True,
        "last",
        -1,
    )
    assert (args.fp16_opt_level, args.half_precision_backend, args.mp_parameters) == ("O1", "auto", "")


def test_simpo_config_has_the_defaults_of_its_document() -> None:
    args = SimPOConfig(output_dir="out")
    assert (args.beta, args.gamma_beta_ratio, args.sft_weight) == (2.0, 0.25, 0.0)
    assert (args.loss_type, args.label_smoothing, args.disable_dropout) == ("sigmoid", 0.0, True)
    assert (args.learning_rate, args.logging_steps, args.save_steps) == (5e-5, 500, 500)
    assert (args.bf16, args.gradient_checkpointing) == (False, False)
    assert (args.max_length, args.max_prompt_length, args.max_target_length) == (None, None, None)


def test_bf16_gives_way_to_fp16() -> None:
    assert CPOConfig(fp16=True).bf16 is False
    assert CPOConfig(bf16=False).bf16 is False


def test_the_machine_of_the_script_need_not_be_able_to_train() -> None:
    given = {"zero_optimization": {"stage": 3}}
    args = SimPOConfig(bf16=True, bf16_full_eval=True, tf32=True, deepspeed=given, fsdp="full_shard")
    assert (args.bf16, args.bf16_full_eval, args.tf32, args.deepspeed, args.fsdp) == (
        True,
        True,
        True,
        given,
        "full_shard",
    )


def test_older_and_newer_names_of_checkpointing_mirror_each_other() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for args in (
            CPOConfig(gradient_checkpointing=False),
            CPOConfig(activation_checkpointing=False),
            SimPOConfig(),
        ):
            assert (args.gradient_checkpointing, args.activation_checkpointing) == (False, False)
        args = SimPOConfig(
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    assert (args.activation_checkpointing, args.activation_checkpointing_kwargs) == (
        True,
        {"use_reentrant": False},
    )


def test_the_older_name_of_eval_strategy() -> None:
    args = SimPOConfig(evaluation_strategy="steps", logging_steps=7)
    assert (args.eval_strategy, args.eval_steps, args.do_eval) == ("steps", 7, True)


def test_a_command_line_for_cpo() -> None:
    line = (
        "--output_dir gpt2-aligned-cpo --per_device_train_batch_size 4 --max_steps 1000 --learning_rate 8e-6 "
        "--gradient_accumulation_steps 1 --logging_steps 10 --eval_steps 500 --warmup_steps 150 --report_to none "
        "--bf16 --logging_first_step --no_remove_unused_columns --loss_type simpo --cpo_alpha 0 --simpo_gamma 1.5 "
        '--max_prompt_length 128 --lr_scheduler_kwargs {"num_cycles":2} --model_init_kwargs {"dtype":"float32"} '
        "--no_gradient_checkpointing"
    )
    (args,) = HfArgumentParser(CPOConfig).parse_args_into_dataclasses(line.split(), look_for_args_file=False)
    assert (args.output_dir, args.max_steps, args.learning_rate) == ("gpt2-aligned-cpo", 1000, 8e-6)
    assert (args.loss_type, args.cpo_alpha, args.simpo_gamma) == ("simpo", 0.0, 1.5)
    assert (args.bf16, args.gradient_checkpointing, args.remove_unused_columns) == (True, False, False)
    assert (args.lr_scheduler_kwargs, args.model_init_kwargs) == ({"num_cycles": 2}, {"dtype": "float32"})


def test_a_command_line_for_simpo() -> None:
    line = (
        "--output_dir out --beta 2.5 --gamma_beta_ratio 0.55 --loss_type hinge --sft_weight 0.1 --bf16 "
        "--evaluation_strategy epoch --warmup_ratio 0.1 --lr_scheduler_type cosine --gradient_checkpointing "
        "--max_length 2048 --max_prompt_length 1800 --no_disable_dropout"
    )
    (args,) = HfArgumentParser(SimPOConfig).parse_args_into_dataclasses(
        line.split(), look_for_args_file=False
    )
    assert (args.beta, args.gamma_beta_ratio, args.loss_type, args.sft_weight) == (2.5, 0.55, "hinge", 0.1)
    assert (args.bf16, args.gradient_checkpointing, args.disable_dropout) == (True, True, False)
    assert (args.eval_strategy, args.warmup_ratio, args.lr_scheduler_type) == ("epoch", 0.1, "cosine")
    assert (args.max_length, args.max_prompt_length) == (2048, 1800)


@pytest.mark.parametrize("kind", [CPOConfig, SimPOConfig])
def test_help_and_choices(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    parser = HfArgumentParser(kind)
    assert "--gamma_beta_ratio" in parser.format_help() or "--simpo_gamma" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--loss_type", "kto_pair"], look_for_args_file=False)
    assert "argument --loss_type/--loss-type: invalid choice: 'kto_pair'" in capsys.readouterr().err


def test_a_copy_is_equal_and_arguments_can_be_written_down() -> None:
    args = CPOConfig(output_dir="out", bf16=True, deepspeed={"zero_optimization": {"stage": 2}})
    copy = dataclasses.replace(args, learning_rate=2e-6)
    assert (copy.bf16, copy.deepspeed, copy.learning_rate) == (True, args.deepspeed, 2e-6)
    assert '"beta": 0.1' in args.to_json_string()
