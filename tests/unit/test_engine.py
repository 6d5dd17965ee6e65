"""The plain engine, by hand: gradients, clipping, schedule, precision, and a checkpoint that goes on bitwise."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_prefopt.config import TrainConfig
from ray_prefopt.engine import plain as plain_module
from ray_prefopt.engine.build import build_engine
from ray_prefopt.engine.plain import PlainEngine
from ray_prefopt.errors import CheckpointError, NonFiniteError
from tests.tiny import tiny_config, tiny_model

CPU = torch.device("cpu")


def engine_of(
    module: nn.Module, *, total_steps: int = 10, dtype: torch.dtype = torch.float32, **optim: Any
) -> PlainEngine:
    config = TrainConfig(
        model={"path": "-"},
        data={"train": "-"},
        optim={"name": "sgd", "learning_rate": 1.0, "warmup_ratio": 0.0, "schedule": "constant", **optim},
    )
    return PlainEngine(module, config.optim, total_steps=total_steps, dtype=dtype, device=CPU)


def two_weights() -> nn.Linear:
    """x @ w with w = (0, 0): the gradient of engine.forward(input=(3, 4)) is (3, 4), and its norm 5."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


INPUT = torch.tensor([3.0, 4.0])


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose other rank always has the same gradients."""

    def all_reduce(value: Tensor, *, async_op: bool) -> SimpleNamespace:
        assert async_op
        return SimpleNamespace(wait=lambda: value.mul_(2))

    group = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce)
    monkeypatch.setattr(plain_module, "dist", group)


def step(engine: PlainEngine, *inputs: Tensor) -> float:
    for value in inputs:
        engine.backward(engine.forward(input=value).sum())
    return engine.step()


@pytest.mark.parametrize(
    ("max_grad_norm", "moved"), [(1.0, [0.6, 0.8]), (2.5, [1.5, 2.0]), (9.0, [3, 4]), (0.0, [3, 4])]
)
def test_gradients_are_scaled_down_to_the_norm(max_grad_norm: float, moved: list[float]) -> None:
    engine = engine_of(two_weights(), max_grad_norm=max_grad_norm)
    assert step(engine, INPUT) == pytest.approx(5.0)
    assert engine.module.weight.tolist() == [pytest.approx([-each for each in moved], rel=1e-5)]


def test_gradients_add_up_until_the_step_and_are_gone_after_it() -> None:
    engine = engine_of(two_weights(), max_grad_norm=0.0)
    assert step(engine, INPUT, INPUT, -3 * INPUT) == pytest.approx(5.0)
    assert engine.module.weight.tolist() == [[3.0, 4.0]]
    assert step(engine, torch.tensor([1.0, 0.0])) == pytest.approx(1.0)
    assert engine.module.weight.tolist() == [[2.0, 4.0]]


def test_weights_without_gradient_take_part_with_zero(two_ranks: None) -> None:
    """As an expert without tokens on this rank, but not on the others."""
    module = nn.Sequential(two_weights(), nn.Linear(1, 1, bias=False))
    engine = engine_of(module, max_grad_norm=0.0)
    before = module[1].weight.item()
    engine.backward(module[0](INPUT).sum())
    assert engine.step() == pytest.approx(10.0)
    assert module[1].weight.item() == before


def test_frozen_weights_stay() -> None:
    module = nn.Sequential(two_weights(), nn.Linear(1, 1, bias=False))
    module[1].weight.requires_grad_(False)
    nn.init.constant_(module[1].weight, 2.0)
    engine = engine_of(module, max_grad_norm=0.0)
    assert step(engine, INPUT) == pytest.approx(10.0)
    assert module[0].weight.tolist() == [[-6.0, -8.0]]
    assert module[1].weight.item() == 2.0


def test_the_rate_is_that_of_the_next_step() -> None:
    engine = engine_of(two_weights(), total_steps=4, schedule="linear", warmup_ratio=0.5, max_grad_norm=0.0)
    moved = []
    for rate in (0.0, 0.5, 1.0, 0.5):
        assert engine.learning_rate() == rate
        before = engine.module.weight[0, 0].item()
        step(engine, INPUT)
        moved.append(before - engine.module.weight[0, 0].item())
    assert moved == [0.0, 1.5, 3.0, 1.5]
    assert engine.learning_rate() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(value: float) -> None:
    engine = engine_of(two_weights(), schedule="linear")
    with pytest.raises(NonFiniteError, match=rf"^the gradient norm is {value}$"):
        step(engine, INPUT, torch.tensor([0.0, value]))
    assert engine.module.weight.tolist() == [[0.0, 0.0]]
    assert engine.learning_rate() == 1.0


# --- precision ---


def test_half_precision_is_autocast_over_fp32() -> None:
    engine = engine_of(two_weights().bfloat16(), dtype=torch.bfloat16, learning_rate=2.0**-12)
    assert engine.module.weight.dtype == torch.float32
    assert engine.forward(input=INPUT).dtype == torch.bfloat16
    nn.init.ones_(engine.module.weight)
    step(engine, torch.tensor([1.0, 0.0]))
    assert engine.module.weight.tolist() == [[1 - 2.0**-12, 1.0]]  # bfloat16 has no such number


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows() -> None:
    engine = engine_of(two_weights(), dtype=torch.float16, max_grad_norm=0.0)

    def step_by(value: Tensor) -> float:
        engine.backward(engine.forward(input=value).float().sum() / 8)
        return engine.step()

    assert engine._scaler.get_scale() == 65536
    assert step_by(INPUT) == 5 / 8
    assert engine.module.weight.tolist() == [[-3 / 8, -4 / 8]]
    assert step_by(4 * INPUT) == float("inf")  # 12 * 65536 / 8 is no fp16
    assert engine.module.weight.tolist() == [[-3 / 8, -4 / 8]]
    assert engine._scaler.get_scale() == 65536 / 2
    assert step_by(-2 * INPUT) == 10 / 8
    assert engine.module.weight.tolist() == [[3 / 8, 4 / 8]]


# --- checkpoints ---


def train(engine: PlainEngine, steps: range) -> list[float]:
    """Some steps on tokens that depend on the step alone."""
    norms = []
    for number in steps:
        ids = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(number))
        engine.backward(engine.forward(input_ids=ids, labels=ids).loss)
        norms.append(engine.step())
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw_torch", "adafactor"])
def test_a_loaded_engine_goes_on_bitwise(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"name": name, "learning_rate": 1e-2, "schedule": "linear", "dtype": dtype}
    engine = engine_of(tiny_model(), **options)
    train(engine, range(2))
    engine.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "engine.pt"}
    norms = train(engine, range(2, 4))

    loaded = engine_of(tiny_model(seed=1), **options)
    loaded.load(tmp_path)
    assert train(loaded, range(2, 4)) == norms
    assert loaded.learning_rate() == engine.learning_rate() == pytest.approx(0.006)
    for name, weight in engine.module.state_dict().items():
        assert torch.equal(weight, loaded.module.state_dict()[name]), name


def test_the_scale_of_fp16_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    engine, loaded = (engine_of(two_weights(), dtype=torch.float16) for _ in range(2))
    assert step(engine, INPUT) == float("inf")
    engine.save(tmp_path)
    loaded.load(tmp_path)
    assert loaded._scaler.get_scale() == engine._scaler.get_scale() == 65536 / 2


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    engine = engine_of(tiny_model("gpt2"))
    engine.save(tmp_path)
    loaded = engine_of(tiny_model("gpt2", seed=1))
    loaded.load(tmp_path)
    assert loaded.module.lm_head.weight is loaded.module.transformer.wte.weight
    assert torch.equal(loaded.module.lm_head.weight, engine.module.lm_head.weight)


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(two_weights())
    monkeypatch.setattr(
        plain_module, "dist", SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 1)
    )
    engine.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_gradients_of_ranks_are_summed(two_ranks: None) -> None:
    engine = engine_of(two_weights(), max_grad_norm=0.0)
    assert step(engine, INPUT) == pytest.approx(10.0)
    assert engine.module.weight.tolist() == [[-6.0, -8.0]]


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("code in a checkpoint was run",)


def without_optimizer(folder: Path) -> None:
    torch.save({"schedule": {}, "scaler": {}}, folder / "engine.pt")


UNLOADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no optimizer": (lambda folder: (folder / "engine.pt").unlink(), "engine.pt"),
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"1234"), ""),
    "code": (lambda folder: torch.save(RunsCode(), folder / "engine.pt"), "Weights only load failed"),
    "other states": (without_optimizer, "'optimizer'"),
}


@pytest.mark.parametrize("case", UNLOADABLE)
def test_what_cannot_be_loaded_is_refused(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # the engine's own care is meant
    engine_of(two_weights()).save(tmp_path)
    spoil, message = UNLOADABLE[case]
    spoil(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"^{tmp_path}: cannot be loaded into this model: (.|\n)*{message}"
    ):
        engine_of(two_weights()).load(tmp_path)


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 1, bias=False), nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1))]
)
def test_weights_of_another_model_are_refused(tmp_path: Path, other: nn.Module) -> None:
    engine_of(two_weights()).save(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: cannot be loaded into this model: "):
        engine_of(other).load(tmp_path)


def test_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    engine_of(model).save(tmp_path)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"cannot be loaded into this model: loaded state dict"):
        engine_of(model).load(tmp_path)


# --- what a config asks for ---


def config_of(**sections: Any) -> TrainConfig:
    model = {"from_config": tiny_config(), "tokenizer": "-", "dtype": "float32", **sections.pop("model", {})}
    return TrainConfig(model=model, data={"train": "-"}, **{"engine": {"kind": "plain"}, **sections})


def test_a_config_builds_its_engine() -> None:
    optim = {"learning_rate": 0.25, "schedule": "linear", "warmup_ratio": 0.5, "name": "adafactor"}
    engine = build_engine(config_of(optim=optim), total_steps=8, device=CPU)
    assert isinstance(engine, PlainEngine)
    assert type(engine.optimizer).__name__ == "Adafactor"
    train(engine, range(2))
    assert engine.learning_rate() == 0.125
    assert engine.module.training


@pytest.mark.parametrize(
    ("dtype", "computed"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float16)]
)
def test_the_config_says_the_precision(dtype: str, computed: torch.dtype) -> None:
    architecture = tiny_config(dtype="float16")
    engine = build_engine(
        config_of(model={"from_config": architecture, "dtype": dtype}), total_steps=8, device=CPU
    )
    assert engine.forward(input_ids=torch.tensor([[1]])).logits.dtype == computed
    assert {weight.dtype for weight in engine.module.parameters()} == {torch.float32}


def test_the_seed_says_the_weights() -> None:
    one, two, three = (
        build_engine(config_of(run={"seed": seed}), total_steps=8, device=CPU).module.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], three["lm_head.weight"])
