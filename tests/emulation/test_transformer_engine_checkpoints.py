"""Models of Transformer Engine's layers hold torch's weights under torch's keys, and checkpoints move both ways."""

import pytest
import torch

from tests.emulation.fake_te.installation import missing_source
from tests.emulation.fake_te.running import run_with_fake_te
from tests.helpers.workbench import make_model, make_settings

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(missing_source() is not None, reason=str(missing_source())),
]

LAYOUTS = {"tensor": {"parallel__tensor": 2}, "expert": {"parallel__expert": 2}}
CASES = {
    "llama": ("llama", "tensor", {}),
    "qwen2": ("qwen2", "tensor", {}),
    "adapters": ("llama", "tensor", {"lora__rank": 3}),
    "mixture": ("mixtral", "expert", {}),
    "latents": ("deepseek_v3", "expert", {}),
    "delta nets": ("qwen3_5_text", "tensor", {}),
}
BACKENDS = ("torch", "transformer_engine")


def compare_backends(rank, models, folder):
    """On each rank: case → what both backends hold of one Hugging Face model, and checkpoints from one to the other."""
    from megatron_sstoken.parallel import create_layout, reset_layout

    results = {}
    for layout_name, parallel in LAYOUTS.items():
        layout = create_layout(make_settings("", "", **parallel).parallel, 1)
        for name, (family, wanted, changes) in CASES.items():
            if wanted == layout_name:
                settings = make_settings(models[family], "", training__precision="bf16", **(parallel | changes))
                results[name] = compare_case(settings, layout, f"{folder}/{name}")
        reset_layout()
    return results


def compare_case(settings, layout, folder):
    from megatron_sstoken.checkpoint.manifest import AdapterIdentity, RunState, open_checkpoint
    from megatron_sstoken.checkpoint.save_load import load_checkpoint, save_checkpoint
    from megatron_sstoken.model.build import build_model, load_weights
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.model.lora_targets import is_adapter
    from megatron_sstoken.model.weights import rules_of_chunk

    path, lora = settings.model.hf_path, settings.lora
    architecture = read_architecture(path)

    def build(backend):
        settings.model.backend = backend
        return build_model(architecture, settings, layout, captured_layers=(4,), trainable=False)

    def held(model):
        """Weights by their rules, adapters by their names."""
        rules = rules_of_chunk(model.unwrapped[0], architecture)
        return {
            name if is_adapter(name) else (rules[name][0].megatron, rules[name][1]): parameter.detach().clone()
            for name, parameter in model.unwrapped[0].named_parameters()
        }

    def equal(first, second, only=lambda key: True):
        keys = [key for key in first if only(key)]
        return (
            bool(keys) and first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in keys)
        )

    models = {name: build(name) for name in BACKENDS}
    for model in models.values():
        load_weights(model, path)
    results = {"loaded": equal(*map(held, models.values()))}
    adapters = AdapterIdentity(lora.rank, lora.alpha, lora.dropout, lora.targets, None) if lora.rank else None
    for name, other in (BACKENDS, BACKENDS[::-1]):
        with torch.no_grad():
            for parameter in models[name].unwrapped[0].parameters():
                parameter.add_(1.0)
        state = RunState(1, None, path, adapters=adapters)
        saved = save_checkpoint(f"{folder}-{name}", state, models[name], None, None, keep=0)
        target = build(other)
        load_checkpoint(open_checkpoint(str(saved)), target)
        # Of a run with adapters these alone are stored.
        only = (lambda key: isinstance(key, str)) if adapters else (lambda key: True)
        results[f"{name} to {other}"] = equal(held(models[name]), held(target), only)
    return results


def test_both_backends_hold_the_same_weights_under_the_same_keys(tmp_path):
    models = {family: make_model(tmp_path / family, family) for family in {family for family, *_ in CASES.values()}}
    for results in run_with_fake_te(compare_backends, 2, models, str(tmp_path)):
        assert results.keys() == CASES.keys()
        for name, result in results.items():
            assert len(result) == 3 and all(result.values()), (name, result)


def keep_scales(rank, model_path, folder):
    """Give every layer a state of delayed scaling, save it, and load it into another model: the scales of both."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from megatron_sstoken.checkpoint.manifest import RunState, open_checkpoint
    from megatron_sstoken.checkpoint.save_load import load_checkpoint, save_checkpoint
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.parallel import create_layout

    settings = make_settings(model_path, "", model__backend="transformer_engine", training__precision="bf16")
    layout = create_layout(settings.parallel, 1)

    def layers(model):
        chosen = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
        found = [(n, m) for n, m in model.unwrapped[0].named_modules() if n.endswith(chosen)]
        return [(n, m) for n, m in found if isinstance(m, TransformerEngineBaseModule)]

    def build():
        return build_model(read_architecture(model_path), settings, layout, captured_layers=(4,), trainable=False)

    first, second = build(), build()
    for number, (_, layer) in enumerate(layers(first)):
        layer.fp8_meta.update(fp8_checkpoint=True, recipe=DelayedScaling(amax_history_len=8), num_gemms=1)
        layer.init_fp8_meta_tensors(layer.fp8_meta["recipe"])
        layer.fp8_meta["scaling_fwd"].scale.fill_(number + 2.0)
        layer.fp8_meta["scaling_fwd"].amax_history.fill_(number + 0.5)
    path = save_checkpoint(folder, RunState(1, None, model_path), first, None, None, keep=0)
    load_checkpoint(open_checkpoint(str(path)), second)
    return [
        [
            (m.fp8_meta["scaling_fwd"].scale.tolist(), m.fp8_meta["scaling_fwd"].amax_history.tolist())
            for _, m in layers(x)
        ]
        for x in (first, second)
    ]


def test_scales_and_largest_values_are_in_the_checkpoint(tmp_path):
    model = make_model(tmp_path / "model")
    ((before, after),) = run_with_fake_te(keep_scales, 1, model, str(tmp_path / "run"))
    assert len(before) == 16 and before == after
    assert before[3][0][0] == 5.0
