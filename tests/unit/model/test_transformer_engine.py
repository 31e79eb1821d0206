"""Models of Transformer Engine's layers, as far as a machine without a GPU can build them: names, weights, checkpoints.

Needs the package (which imports beside a CUDA build of torch only); its kernels are tested in tests/gpu.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_settings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer_engine is not installed"
)


def pretend_hopper() -> None:
    """Transformer Engine refuses to build a layer where there is no GPU, though it needs none for that."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.cuda.get_device_properties = lambda *args: SimpleNamespace(major=9, minor=0)


def compare_backends(rank, model_path, folder):
    """On each rank: what both backends hold of one Hugging Face model, and checkpoints from one to the other."""
    from megatron_sstoken.checkpoint.manifest import RunState, open_checkpoint
    from megatron_sstoken.checkpoint.save_load import load_checkpoint, save_checkpoint
    from megatron_sstoken.model.build import build_model, load_weights
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.model.weights import rules_of_chunk
    from megatron_sstoken.parallel import create_layout

    pretend_hopper()
    settings = make_settings(model_path, "", parallel__tensor=2, training__precision="bf16")
    layout = create_layout(settings.parallel, 1)
    architecture = read_architecture(model_path)

    def build(backend):
        settings.model.backend = backend
        return build_model(architecture, settings, layout, captured_layers=(4,), trainable=False)

    def by_rule(model):
        rules = rules_of_chunk(model.unwrapped[0], architecture)
        return {(rules[name][0].megatron, rules[name][1]): p for name, p in model.unwrapped[0].named_parameters()}

    def equal(first, second):
        return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    metadata = {"dp_cp_group": layout.groups.dp_cp}
    models = {name: build(name) for name in ("torch", "transformer_engine")}
    for model in models.values():
        load_weights(model, model_path)
    results = {"loaded": equal(*map(by_rule, models.values()))}
    for name, other in (("torch", "transformer_engine"), ("transformer_engine", "torch")):
        path = save_checkpoint(f"{folder}/{name}", RunState(1, None, model_path), models[name], None, None, keep=0)
        target = build(other)
        load_checkpoint(open_checkpoint(str(path)), target)
        results[f"{name} to {other}"] = equal(by_rule(models[name]), by_rule(target))
    keys = [
        {
            value.key
            for value in model.unwrapped[0].sharded_state_dict(metadata=metadata).values()
            if "_extra" not in value.key
        }
        for model in models.values()
    ]
    return results | {"keys": keys[0] == keys[1]}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_backends_hold_the_same_weights_under_the_same_keys(tmp_path, family):
    model = make_model(tmp_path / "model", family)
    for results in run_distributed(compare_backends, 2, model, str(tmp_path)):
        assert len(results) == 4 and all(results.values()), results


def keep_scales(rank, model_path, folder):
    """Give every layer a state of delayed scaling, save it, and load it into another model: the scales of both."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from megatron_sstoken.checkpoint.manifest import RunState, open_checkpoint
    from megatron_sstoken.checkpoint.save_load import load_checkpoint, save_checkpoint
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.parallel import create_layout

    pretend_hopper()
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
    ((before, after),) = run_distributed(keep_scales, 1, model, str(tmp_path / "run"))
    assert len(before) == 16 and before == after
    assert before[3][0][0] == 5.0
