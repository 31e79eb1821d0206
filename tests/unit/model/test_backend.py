"""What layers are made of: the choice, what a machine lacks for it, and that FP8 is never silently left out."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_sstoken.config import Settings
from megatron_sstoken.model import backend
from megatron_sstoken.model.backend import (
    backend_of,
    fp8_options,
    fusion_options,
    machine_problems,
    numerics_of,
    passed_over,
)
from megatron_sstoken.supported import TOKEN_MULTIPLE
from megatron_sstoken.validate.settings import problems_of


def make(chosen="auto", precision="bf16", recipe="tensorwise", first=0, last=0) -> Settings:
    settings = Settings()
    settings.model.backend, settings.training.precision = chosen, precision
    settings.training.fp8_recipe = recipe
    settings.training.fp8_first_bf16_layers, settings.training.fp8_last_bf16_layers = first, last
    return settings


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a machine with Transformer Engine: compute capability and CUDA version → nothing."""

    def pretend(capability=(9, 0), cuda="13.0"):
        monkeypatch.setattr(backend, "transformer_engine_problem", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return pretend


def test_auto_takes_transformer_engine_where_it_can_run_and_computes_the_precision(gpu):
    assert backend_of(make()) == backend_of(make(precision="fp32")) == "torch"
    gpu()
    assert backend_of(make()) == backend_of(make(precision="fp8")) == "transformer_engine"
    assert backend_of(make(precision="fp32")) == backend_of(make("torch")) == "torch"


def test_a_gpu_without_transformer_engine_is_told_loudly(monkeypatch):
    assert passed_over(make()) is None, "a laptop has no use for it"
    monkeypatch.setattr(backend, "have_cuda", lambda: True)
    monkeypatch.setattr(backend, "transformer_engine_problem", lambda: "it is too new")
    warning = passed_over(make())
    assert warning.startswith("WARNING") and "it is too new" in warning and "model.backend=torch" in warning
    assert passed_over(make("torch")) is passed_over(make(precision="fp32")) is None
    monkeypatch.setattr(backend, "transformer_engine_problem", lambda: None)
    assert passed_over(make()) is None


def test_without_cuda_both_are_refused_by_name_with_a_remedy():
    (problem,) = machine_problems(make("transformer_engine"))
    assert "model.backend=transformer_engine cannot run: this machine has no CUDA device" in problem
    (problem,) = machine_problems(make(precision="fp8"))
    assert "training.precision=fp8 with training.fp8_recipe=tensorwise cannot run" in problem
    assert "use training.precision=bf16" in problem
    assert machine_problems(make()) == []


def test_what_saves_memory_with_transformer_engine_is_refused_without(gpu):
    settings = make()
    settings.optimizer.second_moment_dtype = "bf16"
    settings.optimizer.offload_fraction, settings.training.offload_layers = 0.5, 2
    told = machine_problems(settings)
    assert [
        problem.split(" needs Transformer Engine, which cannot run: this machine has no CUDA")[0] for problem in told
    ] == [
        "optimizer.second_moment_dtype=bf16",
        "optimizer.offload_fraction=0.5",
        "training.offload_layers=2",
    ]
    assert told[0].endswith("; or use fp32") and told[1].endswith("; or use 0")
    gpu()
    assert machine_problems(settings) == []


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "says"),
    [
        ("mxfp8", (9, 0), "13.0", "mxfp8 needs 10.x"),
        ("mxfp8", (12, 0), "13.0", "mxfp8 needs 10.x"),
        ("blockwise", (9, 0), "12.8", "blockwise needs 9.0 (Hopper) and CUDA 12.9"),
        ("delayed", (8, 0), "13.0", "FP8 needs 8.9"),
    ],
)
def test_gpus_that_cannot_compute_a_recipe(gpu, recipe, capability, cuda, says):
    gpu(capability, cuda)
    (problem,) = machine_problems(make(precision="fp8", recipe=recipe))
    assert says in problem


def test_hopper_computes_three_recipes_and_blackwell_the_fourth(gpu):
    gpu((9, 0), "12.9")
    assert [r for r in TOKEN_MULTIPLE if machine_problems(make(precision="fp8", recipe=r))] == ["mxfp8"]
    gpu((10, 0), "13.0")
    assert machine_problems(make(precision="fp8", recipe="mxfp8")) == []


def test_settings_that_contradict_each_other():
    def problem(settings):
        settings.model.hf_path = settings.data.train = "x"
        return problems_of(settings)

    assert problem(make(precision="fp8", first=1, last=2)) == []
    assert "a training.fp8_recipe other than delayed" in problem(make(precision="fp8", recipe="delayed", first=1))[0]
    assert "training.fp8_last_bf16_layers=1 needs training.precision=fp8" in problem(make(last=1))[0]
    assert "not in training.precision=fp32" in problem(make("transformer_engine", "fp32"))[0]
    assert "model.backend=torch cannot compute" in problem(make("torch", "fp8"))[0]


@pytest.mark.parametrize("recipe", TOKEN_MULTIPLE)
def test_megatron_takes_the_options_of_every_recipe(recipe):
    layers = 0 if recipe == "delayed" else 1
    options = fp8_options(make(precision="fp8", recipe=recipe, first=layers, last=layers).training)
    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, params_dtype=torch.bfloat16, **options
    )
    assert config.fp8 and config.fp8_recipe == recipe and config.first_last_layers_bf16 == bool(layers)
    assert fp8_options(make().training) == {}


def test_what_decides_rounding_is_told_apart(gpu):
    same = [numerics_of(make(precision="fp8", recipe=recipe)) for recipe in TOKEN_MULTIPLE]
    same += [numerics_of(make(precision="fp8", first=1)), numerics_of(make(precision="fp8", last=1))]
    same += [numerics_of(make("torch")), numerics_of(make("transformer_engine"))]
    assert len(set(same)) == len(same)
    assert numerics_of(make("torch")) == "bf16"


def test_fused_weight_gradients_only_with_apex_extension(gpu, monkeypatch):
    assert not any(fusion_options("torch").values())
    assert not fusion_options("transformer_engine")["gradient_accumulation_fusion"]
    monkeypatch.setattr(backend, "have_cuda", lambda: True)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name)
    assert fusion_options("torch")["gradient_accumulation_fusion"]


def test_weight_gradients_are_accumulated_in_the_products_of_linears_that_can():
    able, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    able.fuse_wgrad_accumulation = False
    backend.accumulate_in_products(torch.nn.Sequential(able, other))
    assert able.fuse_wgrad_accumulation and not hasattr(other, "fuse_wgrad_accumulation")


def test_a_compiled_head_without_a_compiler_is_refused(monkeypatch):
    settings = Settings()
    settings.model.compiled_head = True
    monkeypatch.setattr(backend, "have_cuda", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    (problem,) = backend.machine_problems(settings)
    assert "model.compiled_head=true" in problem and "no C++ compiler" in problem
