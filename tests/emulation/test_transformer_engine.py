"""Training on Transformer Engine's layers equals training on torch's: families, layouts, settings.

Both run on a pretended GPU, with stand-ins for kernels, and in fp32, so that they agree closely. (On a GPU Transformer
Engine's attention computes in bf16, and a run in fp32 is refused.)
"""

import pytest

from tests.emulation.fake_te.installation import missing_source
from tests.emulation.fake_te.running import run_with_fake_te
from tests.helpers.workbench import FAMILIES, make_model, make_samples, make_settings, make_store

pytestmark = [
    pytest.mark.timeout(1600),
    pytest.mark.skipif(missing_source() is not None, reason=str(missing_source())),
]

BACKENDS = ("torch", "transformer_engine")
SEQUENCE = {"parallel__tensor": 2, "parallel__sequence": True}
FULL = {"training__recompute": "full"}
ADAPTERS = {
    "lora__rank": 3,
    "lora__alpha": 5.0,
    "history__source": "adapters_off",
    "history__hf_path": None,
    "training__steps": 3,
    "optimizer__learning_rate": 1e-2,  # A learns only as far as B has grown from zero
}
SOME_ADAPTERS = ADAPTERS | {"lora__targets": ["v_proj", "up_proj", "down_proj"], "lora__dropout": 0.2}

# name → (family, settings)
ALONE = {family: (family, {}) for family in FAMILIES} | {
    "full recompute": ("llama", FULL),
    "selective recompute": ("llama", {"training__recompute": "selective"}),
    "two layers captured": ("llama", {"selection__layer": [0, -1]}),
    "standard head": ("llama", {"model__head": "standard"}),
    "scope batch": ("llama", {"selection__scope": "batch"}),
    "adapters": ("qwen2", ADAPTERS),
    "some adapters, dropout, full recompute": ("qwen3", SOME_ADAPTERS | FULL),
    "bf16": ("qwen2", {"training__precision": "bf16"}),
    "bf16, adapters": ("llama", ADAPTERS | {"training__precision": "bf16"}),
    "adapters, no norms before linears": ("olmo2", ADAPTERS),
    "adapters of a mixture": ("qwen3_moe", ADAPTERS | {"lora__targets": ["q_proj", "o_proj"]}),
}
TOGETHER = {
    "dp2": ("llama", {}),
    "tp2": ("llama", {"parallel__tensor": 2}),
    "tp2-sequence": ("qwen2", SEQUENCE),
    "tp2-sequence, full recompute": ("llama", SEQUENCE | FULL),
    "pp2": ("qwen2", {"parallel__pipeline": 2}),
    "cp2": ("llama", {"parallel__context": 2}),
    "cp2, full recompute": ("llama", {"parallel__context": 2} | FULL),
    "cp2, windows": ("mistral", {"parallel__context": 2}),
    "cp2, windows in some layers": ("qwen3", {"parallel__context": 2}),
    "ep2": ("mixtral", {"parallel__expert": 2}),
    "adapters, tp2": ("llama", ADAPTERS | {"parallel__tensor": 2, "lora__dropout": 0.1}),
    "adapters, tp2-sequence": ("qwen2", ADAPTERS | SEQUENCE),
    "some adapters, dropout, tp2-sequence, full recompute": ("llama", SOME_ADAPTERS | SEQUENCE | FULL),
    "adapters, pp2, full recompute": ("llama", ADAPTERS | {"parallel__pipeline": 2} | FULL),
    "tp2-sequence, mixture": ("qwen3_moe", SEQUENCE),
    "tp2-sequence, mixture, layers not alike": ("glm4_moe", SEQUENCE),
    "tp2-sequence, two rotaries": ("olmo3", SEQUENCE),
    "tp2-sequence, sinks": ("gpt_oss", SEQUENCE | {"parallel__expert": 2}),
    "cp2, sinks": ("gpt_oss", {"parallel__context": 2}),
    "tp2-sequence, latents": ("deepseek_v3", SEQUENCE | {"parallel__expert": 2}),
    "adapters of latents, tp2-sequence": (
        "deepseek_v3",
        ADAPTERS | SEQUENCE | {"lora__targets": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]},
    ),
    "cp2, latents": ("deepseek_v3", {"parallel__context": 2}),
    "adapters of delta nets, tp2-sequence": ("qwen3_5_text", ADAPTERS | SEQUENCE),
    "tp2-sequence, delta nets": ("qwen3_next", SEQUENCE | {"parallel__expert": 2}),
    "cp2, delta nets": ("qwen3_5_text", {"parallel__context": 2}),
    "adapters, tp2-sequence, no norms before linears": ("olmo2", ADAPTERS | SEQUENCE),
}


def train_on_both(rank, cases):
    """On each rank: name → backend → what every step told."""
    from megatron_sstoken.validate import settings as rules
    from tests.helpers.workbench import run_training

    rules._backend_problems = lambda settings: []  # lets Transformer Engine compute in fp32
    return {name: dict(zip(BACKENDS, run_training(rank, list(pair)), strict=True)) for name, pair in cases.items()}


def run_cases(folder, cases, num_ranks):
    """Name → backend → steps, as the last rank told them."""
    folder.mkdir(exist_ok=True)
    data = make_store(folder / "data", make_samples(24))
    models = {}
    for family in {family for family, _ in cases.values()}:
        models[family] = [make_model(folder / family, family), make_model(folder / f"{family}-old", family, seed=1)]
    settings = {}
    for name, (family, changes) in cases.items():
        model, history = models[family]
        common = {
            "history__hf_path": history,
            "data__packing": True,
            "data__sequence_length": 64,
            "training__micro_batch_size": 2,
            "training__steps": 2,
        }
        settings[name] = [make_settings(model, data, **(common | {"model__backend": b} | changes)) for b in BACKENDS]
    return run_with_fake_te(train_on_both, num_ranks, settings, timeout=1500)[-1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("alone") / "runs", ALONE, 1)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("together") / "runs", TOGETHER, 2)


def check_equal(backends, name=""):
    assert len(backends["torch"]) >= 2
    loss, norm = (1e-2, 5e-2) if "bf16" in name else (1e-5, 1e-4)
    for ours, theirs in zip(backends["transformer_engine"], backends["torch"], strict=True):
        assert (ours["num_selected"], ours["num_response"]) == (theirs["num_selected"], theirs["num_response"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=loss)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm)


@pytest.mark.parametrize("name", ALONE)
def test_one_process(alone, name):
    check_equal(alone[name], name)


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes(together, name):
    check_equal(together[name], name)


def count_scales_left_behind(rank, model_path):
    """Recompute the attention of a captured layer under delayed FP8 scaling: [states kept for it, without and with capture]."""
    import torch
    import transformer_engine.pytorch as te
    from megatron.core.transformer.enums import AttnMaskType
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_sstoken.model.attention import sample_bounds
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.parallel import create_layout

    settings = make_settings(model_path, "", training__precision="bf16", model__backend="transformer_engine")
    layout = create_layout(settings.parallel, 1)
    model = build_model(read_architecture(model_path), settings, layout, captured_layers=(4,), trainable=False)
    core = model.unwrapped[0].decoder.layers[-1].self_attention.core_attention
    bounds = sample_bounds([16, 16])

    def attend(*qkv):
        return core(*qkv, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=bounds)

    kept = []
    for armed in (False, True):
        if armed:
            model.captures[0].arm(torch.arange(32, device="cuda") < 8)
        qkv = [torch.randn(32, heads, 8, device="cuda", dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)]
        with te.fp8_autocast(enabled=True, fp8_recipe=DelayedScaling()):
            output = te.checkpoint(attend, *qkv, use_reentrant=True)
        masses = model.captures[0].take()
        output.float().sum().backward()
        assert bool(masses) == armed and qkv[0].grad is not None
        kept.append(sum(map(len, FP8GlobalStateManager.fp8_tensors_recompute_buffer)))
    return kept


def test_the_capture_leaves_no_scales_behind(tmp_path):
    """Transformer Engine copies its delayed scales in every forward pass of training that will be recomputed."""
    assert run_with_fake_te(count_scales_left_behind, 1, make_model(tmp_path / "model")) == [[0, 0]]


def accumulate(rank, model_path):
    """Two backward passes through a linear in bf16: the largest difference of its main_grad from the sum in fp32."""
    import torch

    from megatron_sstoken.model.build import build_model, load_weights
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.parallel import create_layout

    settings = make_settings(model_path, "", training__precision="bf16", model__backend="transformer_engine")
    layout = create_layout(settings.parallel, 1)
    model = build_model(read_architecture(model_path), settings, layout, trainable=True)
    load_weights(model, model_path)
    model.zero_gradients()
    linear = model.unwrapped[0].decoder.layers[0].self_attention.linear_proj
    expected = torch.zeros(linear.weight.shape, device="cuda")
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        inputs, upstream = (torch.randn(16, 1, 32, generator=generator).bfloat16().cuda() for _ in range(2))
        linear(inputs.requires_grad_())[0].backward(upstream)
        expected += upstream.squeeze(1).float().t() @ inputs.detach().squeeze(1).float()
    return (linear.weight.main_grad - expected).abs().max().item(), expected.abs().max().item()


def test_weight_gradients_are_summed_in_fp32(tmp_path):
    """In bf16 a product would be rounded before it is added."""
    ((difference, largest),) = run_with_fake_te(accumulate, 1, make_model(tmp_path / "model"))
    assert largest > 1 and difference < 1e-5 * largest
