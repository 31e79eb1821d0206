"""PEFT's adapters on linears that fuse several (Phi's): one A for all parts, the rows of B dealt out; exact, learning alike."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_sstoken.conversion.peft import from_peft
from megatron_sstoken.model.lora_targets import FUSED
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference
from tests.helpers.workbench import load_model, make_model, make_samples, make_settings, make_store, make_trainer
from tests.reference.hf_reference import Objective, loss_and_gradients

TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))
RANK, ALPHA = 3, 5.0
LINEARS = ["qkv_proj", "o_proj", "gate_up_proj"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, data, PEFT's adapters, and what PEFT makes of them: logits, loss and gradients by PEFT's names."""
    path = tmp_path_factory.mktemp("fused")
    make_model(path / "base", "phi3", seed=1)
    samples = make_samples(4, seed=3, longest=30)
    make_store(path / "data", samples)
    torch.manual_seed(7)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(path / "base"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path / "adapters")
    loss, gradients = loss_and_gradients(model, samples, Objective())
    with torch.no_grad():
        logits = model(TOKENS).logits[0]
    gradients = {name.replace(".default", ""): value for name, value in gradients.items()}
    torch.save({"loss": loss, "gradients": gradients, "logits": logits}, path / "expected.pt")
    return path


def convert_and_back(rank, folder):
    """Import, export, and import that again; what does not fit is refused."""
    from megatron_sstoken.conversion.hf import to_hf

    _, lora = from_peft(f"{folder}/adapters", f"{folder}/megatron", hf_path=f"{folder}/base")
    assert (lora.rank, lora.alpha, lora.targets) == (RANK, ALPHA, TARGETS)
    to_hf(f"{folder}/megatron", f"{folder}/back")
    _, lora = from_peft(f"{folder}/back", f"{folder}/again")
    assert (lora.rank, lora.alpha, lora.targets) == (RANK, ALPHA, TARGETS)
    to_hf(f"{folder}/again", f"{folder}/back again")
    shutil.copytree(f"{folder}/back", f"{folder}/mixed")
    weights = load_file(f"{folder}/mixed/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    weights[name][0, RANK] = 1.0  # the queries use what the keys' A gives
    save_file(weights, f"{folder}/mixed/adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has another rank than other linears, and its parts share it: merge"):
        from_peft(f"{folder}/mixed", f"{folder}/out")


def train_on_two(rank, folder):
    """With tensor parallel: logits, the first step's loss, and gradients by (layer, target, matrix) as this rank holds them."""
    from megatron_sstoken.model.attention import sample_bounds
    from megatron_sstoken.model.lora import linears_of_layer
    from megatron_sstoken.training.metrics import summarize
    from megatron_sstoken.training.selector import selector_of, train_on_selected

    settings = make_settings(
        f"{folder}/base",
        f"{folder}/data",
        model__checkpoint=f"{folder}/megatron",
        parallel__tensor=2,
        data__shuffle=False,
        selection__method="full",
        lora__rank=RANK,
        lora__alpha=ALPHA,
        lora__targets=TARGETS,
    )
    trainer = make_trainer(settings)
    model, layout, length = trainer.model, trainer.layout, TOKENS.shape[1]
    model.train(False)
    with torch.no_grad():
        places, bounds = torch.arange(length).unsqueeze(0), sample_bounds([length])
        logits = model.unwrapped[0](TOKENS, places, None, packed_seq_params=bounds)[0]
    model.train(True)
    model.zero_gradients()
    selector = selector_of(settings, layout, gamma=0.5, step=0)
    reports = train_on_selected(model, trainer.loader.load(0), selector, whole_gradients=True)
    gradients = {
        (layer.layer_number - 1, target, name): (linear.adapter_axis.get(name), parameter.main_grad.clone())
        for layer in model.unwrapped[0].decoder.layers
        for _, linear in linears_of_layer(layer)
        for target, adapter in linear.named_adapters().items()
        for name, parameter in adapter.named_parameters()
    }
    return logits, summarize(reports, model.architecture, layout).loss_selected, gradients


@pytest.fixture(scope="module")
def converted(folder):
    run_distributed(convert_and_back, 1, str(folder))
    return folder


def test_logits_loss_and_gradients_equal_pefts(converted):
    expected = torch.load(converted / "expected.pt", weights_only=True)
    first, second = run_distributed(train_on_two, 2, str(converted))
    logits = torch.cat([first[0], second[0]], dim=-1)[:, :99]
    assert (logits - expected["logits"]).abs().max() < 1e-4
    assert first[1] == pytest.approx(expected["loss"], abs=1e-5)

    def whole(layer, target, matrix):
        axis, mine = first[2][layer, target, matrix]
        return mine if axis is None else torch.cat([mine, second[2][layer, target, matrix][1]], dim=axis)

    found = {}
    for name in expected["gradients"]:
        *_, layer, _, linear, matrix, _ = name.split(".")
        parts = [whole(int(layer), part, matrix) for part in FUSED.get(linear, (linear,))]
        # What moved the one A moves its copies, each by its part.
        found[name] = torch.cat(parts) if matrix == "lora_B" else sum(parts)
    worst = largest_difference(found, expected["gradients"])
    print(f"gradients ±{worst:.1e}")
    assert worst < 1e-4


def test_an_export_comes_back_bit_for_bit_and_computes_the_same(converted):
    once, again = (load_file(converted / name / "adapter_model.safetensors") for name in ("back", "back again"))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    configs = [json.loads((converted / name / "adapter_config.json").read_text()) for name in ("back", "back again")]
    assert configs[0] == configs[1] and configs[0]["rank_pattern"] == {"qkv_proj": 9, "gate_up_proj": 6}
    wanted = torch.load(converted / "expected.pt", weights_only=True)["logits"]
    with torch.no_grad():
        base = load_model(converted / "base")
        assert (base(TOKENS).logits[0] - wanted).abs().max() > 1e-2, "they do something"
        found = PeftModel.from_pretrained(base, str(converted / "back"))(TOKENS).logits[0]
    assert (found - wanted).abs().max() < 1e-4
