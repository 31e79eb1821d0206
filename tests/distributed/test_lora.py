"""Adapters compute and learn what PEFT's do, on every layout; the base is frozen, costs nothing, and scores history.

The reference is `peft` on the Hugging Face model, with the same weights and the same adapters (B not zero).
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.distributed_runner import run_distributed
from tests.reference.hf_reference import Objective, loss_and_gradients
from tests.workbench import LAYOUTS, load_model, make_model, make_samples, make_settings, make_store, make_trainer

RANK, ALPHA = 3, 5.0
SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LAYOUTS = LAYOUTS | {
    "cp2": (2, {"parallel.context": 2}),
    "tp2-pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True}),
}
# name → (family, targets, recompute, packed)
CASES = {
    "llama": ("llama", ALL, "none", True),
    "llama, some": ("llama", SOME, "selective", False),
    "qwen2, full recompute": ("qwen2", ALL, "full", True),
}
SELECTION = {"selection__method": "rel", "selection__scope": "microbatch"}


def lora_settings(folder, family, targets=ALL, **changes):
    values = {
        "lora__rank": RANK,
        "lora__alpha": ALPHA,
        "lora__targets": targets,
        "data__shuffle": False,
        "selection__method": "full",
        "training__steps": 2,
    }
    return make_settings(f"{folder}/{family}", f"{folder}/data", **(values | changes))


def named_adapters(model):
    """PEFT's names → (parameter on this rank, axis that tensor parallel splits or None)."""
    from megatron_sstoken.model.lora import TARGETS, adapted_linears

    found = {}
    for chunk in model.bare:
        for layer in chunk.decoder.layers:
            for linear in adapted_linears([layer]):
                for target, adapter in linear.adapters.items():
                    path = f"base_model.model.model.layers.{layer.layer_number - 1}.{TARGETS[target].hugging_face}"
                    for name, parameter in adapter.named_parameters():
                        found[f"{path}.{name}.weight"] = (parameter, linear.adapter_axis.get(name))
    return found


def set_adapters(model, tensors):
    """Fill this rank's slices; the optimizer must be made afterwards, or be told."""
    for name, (parameter, axis) in named_adapters(model).items():
        whole = tensors[name]
        if axis is not None:
            whole = whole.chunk(model.layout.tensor_size, dim=axis)[model.layout.tensor_rank]
        with torch.no_grad():
            parameter.copy_(whole)


def compare_gradients(rank, cases):
    """For each (settings, adapters): loss, and gradients by PEFT's names (rank 0)."""
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.metrics import summarize
    from megatron_sstoken.training.scoring import selector_of
    from megatron_sstoken.training.selector import train_on_selected

    results = []
    for settings, adapters in cases:
        trainer = make_trainer(settings)
        model, layout = trainer.model, trainer.layout
        set_adapters(model, adapters)
        model.zero_gradients()
        reports = train_on_selected(
            model, trainer.loader.load(0), selector_of(settings, layout, gamma=0.5, draw=0), whole_gradients=True
        )
        loss = summarize(reports, model.architecture, layout).loss_selected
        parts = [None] * layout.world_size
        mine = {name: (layout.tensor_rank, axis, p.main_grad.clone()) for name, (p, axis) in named_adapters(model).items()}
        torch.distributed.all_gather_object(parts, mine)
        results.append((loss, whole(parts)))
        reset_layout()
    return results


def whole(parts):
    """Slices of all ranks → whole matrices by PEFT's names."""
    result = {}
    for name in {name for part in parts for name in part}:
        slices = {part[name][0]: part[name][2] for part in parts if name in part}
        axis = next(part[name][1] for part in parts if name in part)
        ordered = [slices[number] for number in sorted(slices)]
        result[name] = ordered[0] if axis is None else torch.cat(ordered, dim=axis)
        if axis is None:
            for other in ordered[1:]:
                torch.testing.assert_close(other, ordered[0])
    return result


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Folder with models and data; for each case adapters by PEFT's names, PEFT's loss and gradients."""
    folder = tmp_path_factory.mktemp("lora")
    samples = make_samples(8, seed=3, longest=30)
    make_store(folder / "data", samples)
    for number, family in enumerate(("llama", "qwen2")):
        make_model(folder / family, family, seed=number + 1)
    expected = {}
    for name, (family, targets, *_) in CASES.items():
        torch.manual_seed(7)
        model = peft_model(folder / family, targets)
        adapters = {key.replace(".default", ""): p.detach().clone() for key, p in trainable(model).items()}
        loss, gradients = loss_and_gradients(model, samples, Objective())
        expected[name] = adapters, loss, {key.replace(".default", ""): value for key, value in gradients.items()}
    return folder, expected


def peft_model(path, targets):
    """PEFT's model with random adapters, B included."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(path), config)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_loss_and_gradients_equal_pefts(bench, layout):
    folder, expected = bench
    num_ranks, parallel = ALL_LAYOUTS[layout]
    cases = [
        (
            lora_settings(
                folder, family, targets, training__recompute=recompute, data__packing=packed, **parallel
            ),
            expected[name][0],
        )
        for name, (family, targets, recompute, packed) in CASES.items()
    ]
    results = run_distributed(compare_gradients, num_ranks, cases)[0]
    for name, (loss, gradients) in zip(CASES, results, strict=True):
        _, wanted_loss, wanted = expected[name]
        assert loss == pytest.approx(wanted_loss, abs=1e-5), name
        assert gradients.keys() == wanted.keys()
        worst = max(float((gradients[key] - wanted[key]).abs().max() / wanted[key].abs().max()) for key in wanted)
        print(f"{layout:<13} {name:<22} loss ±{abs(loss - wanted_loss):.1e}, gradients ±{worst:.1e}")
        assert worst < 1e-4, name
