"""DoRA, and the embedding's adapter, compute and learn what PEFT's do, on every layout, come from its folders and go back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_sstoken.config import LoraSettings
from megatron_sstoken.conversion.peft import from_peft
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.lora_places import num_adapter_parameters
from tests.helpers.adapters import gather_gradients, logits_of, loss_of_first_batch, train_peft
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference
from tests.helpers.workbench import go_on, load_model, make_model, make_samples, make_settings, make_store, make_trainer
from tests.reference.hf_reference import Objective, loss_and_gradients

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),  # PEFT's, of what it saves, too
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))
RANK, ALPHA, LEARNING_RATE, NUM_STEPS, SAVED_AT = 3, 5.0, 1e-2, 3, 2
CASES = {
    "embedding": ("granite", {"targets": ["q_proj", "embed_tokens"]}),  # a model that multiplies its embedding
    "tied embedding": ("qwen2", {"targets": ["q_proj", "embed_tokens"]}),
    "dora": ("qwen2", {"targets": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "dora": True}),  # with biases
    "dora of latents": (
        "deepseek_v3",
        {"targets": ["q_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj"], "dora": True},
    ),
    "dora of delta nets": (
        "qwen3_5_text",
        {"targets": ["o_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"], "dora": True},
    ),
}
"""Name → family, and settings of its adapters."""
CHANGES: dict[str, dict] = {
    "tied embedding": {"tie_word_embeddings": True, "num_hidden_layers": 2},
    "dora of latents": {"q_lora_rank": None, "num_hidden_layers": 2},
    "dora of delta nets": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}
"""What their models differ in; they run on one layout."""
PREFIX = "base_model.model.model.embed_tokens."
LAYOUTS: dict[str, dict] = {
    "tp2": {"parallel__tensor": 2},
    "tp2-sequence": {"parallel__tensor": 2, "parallel__sequence": True, "training__recompute": "full"},
}


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    """A model, data, PEFT's adapters that do something, and what PEFT makes of them."""
    family, lora = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    make_model(path / "base", family, seed=1, **({"tie_word_embeddings": False} | CHANGES.get(request.param, {})))
    samples = make_samples(8, seed=3, longest=30)
    make_store(path / "data", samples)
    torch.manual_seed(7)
    options = {"target_modules": lora["targets"], "use_dora": lora.get("dora", False), "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_model(path / "base"), LoraConfig(r=RANK, lora_alpha=ALPHA, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.dim() > 1 else parameter * 1.3)
    model.save_pretrained(path / "adapters")
    loss, gradients = loss_and_gradients(model, samples, Objective())
    names = {name: name.replace(".default", "").replace("_vector.weight", "_vector") for name in gradients}
    gradients = {names[name]: one for name, one in gradients.items()}
    with torch.no_grad():
        found = {"loss": loss, "gradients": gradients, "logits": model(TOKENS).logits[0]}
    found["losses"] = train_peft(model, samples, LEARNING_RATE, NUM_STEPS)
    with torch.no_grad():
        found["logits after"] = model(TOKENS).logits[0]
    torch.save(found | {"case": request.param}, path / "expected.pt")
    return path


def convert(rank, folder, settings):
    from megatron_sstoken.conversion.hf import to_hf

    _, lora = from_peft(f"{folder}/adapters", f"{folder}/start", hf_path=f"{folder}/base")
    assert (lora.rank, lora.targets, lora.dora) == (RANK, settings["targets"], settings.get("dora", False))
    to_hf(f"{folder}/start", f"{folder}/back")
    if "embed_tokens" not in lora.targets:
        return
    shutil.copytree(f"{folder}/adapters", f"{folder}/other")
    weights = load_file(f"{folder}/other/adapter_model.safetensors")
    weights[f"{PREFIX}base_layer.weight"][5, 6] += 1
    save_file(weights, f"{folder}/other/adapter_model.safetensors")
    change_config(f"{folder}/adapters", f"{folder}/both", ensure_weight_tying=True)
    with pytest.raises(ValueError, match="ensure_weight_tying of an adapter of the embedding, .* is not supported"):
        from_peft(f"{folder}/both", f"{folder}/out", hf_path=f"{folder}/base")
    with pytest.raises(
        ValueError, match=f"{PREFIX}base_layer.weight is not the base's embedding, .*: merge the adapters"
    ):
        from_peft(f"{folder}/other", f"{folder}/out", hf_path=f"{folder}/base")


def change_config(folder, copy, **changes):
    """A copy of PEFT's folder with changes in its configuration."""
    shutil.copytree(folder, copy)
    path = Path(copy, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def train(rank, folder, case, lora):
    mixture = {"parallel__sequence": True} if read_architecture(f"{folder}/base").num_experts else {}
    layouts = LAYOUTS if case not in CHANGES else {"tp2": LAYOUTS["tp2"]}
    return {name: train_one(folder, lora, name, layout | mixture) for name, layout in layouts.items()}


def train_one(folder, lora, name, layout):
    from megatron_sstoken.parallel import reset_layout

    def trainer_of(directory, **changes):
        values = {
            "model__checkpoint": f"{folder}/start",
            "checkpoint__directory": directory,
            "checkpoint__keep": 0,
            "data__shuffle": False,
            "selection__method": "full",
            "training__steps": NUM_STEPS,
            "optimizer__learning_rate": LEARNING_RATE,
            "lora__rank": RANK,
            "lora__alpha": ALPHA,
            **{f"lora__{name}": value for name, value in lora.items()},
        }
        return make_trainer(make_settings(f"{folder}/base", f"{folder}/data", **(values | changes)))

    directory = f"{folder}/{name}"
    trainer = trainer_of(directory, **layout)
    model = trainer.model
    loss, others = loss_of_first_batch(trainer), {}
    if "embed_tokens" in lora["targets"] and trainer.layout.is_first_stage:
        adapter = model.unwrapped[0].embedding.adapters
        others[f"{PREFIX}lora_embedding_A"] = adapter.lora_A.weight.main_grad.t().clone(), 1
        others[f"{PREFIX}lora_embedding_B"] = adapter.lora_B.main_grad.clone(), None
    found = {"loss": loss, "gradients": gather_gradients(model, others)}
    found["losses"] = go_on(trainer, (SAVED_AT, NUM_STEPS))
    if name == "tp2":
        with model.adapters_off() as base:
            found["logits off"] = logits_of(base, TOKENS)
        found["logits"] = logits_of(model, TOKENS)
        reset_layout()
        if trainer.layout.rank == 0:
            shutil.copytree(f"{directory}/step_{SAVED_AT:07d}", f"{directory}-again/step_{SAVED_AT:07d}")
        torch.distributed.barrier()
        found["resumed"] = go_on(trainer_of(f"{directory}-again", parallel__pipeline=2), ())
    reset_layout()
    return found


def export(rank, folder):
    from megatron_sstoken.conversion.hf import to_hf

    to_hf(f"{folder}/tp2", f"{folder}/peft")
    told = []
    to_hf(f"{folder}/tp2", f"{folder}/merged", merge=True, tell=told.append)
    return [line for line in told if "apart" in line]


@pytest.fixture(scope="module")
def results(folder):
    expected = torch.load(folder / "expected.pt", weights_only=True)
    lora = CASES[expected["case"]][1]
    run_distributed(convert, 1, str(folder), lora)
    found = run_distributed(train, 2, str(folder), expected["case"], lora)
    (told,) = run_distributed(export, 1, str(folder))
    tied = read_architecture(str(folder / "base")).tied_embeddings
    assert [line.startswith("embedding and head are written apart (tie_word_embeddings: false)") for line in told] == [
        True
    ] * tied
    return expected, found


def test_loss_gradients_and_steps_equal_pefts(results):
    expected, ranks = results
    for rank in [found for layouts in ranks for found in layouts.values()]:
        assert rank["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert rank.get("resumed", rank["losses"][SAVED_AT:]) == pytest.approx(expected["losses"][SAVED_AT:], abs=1e-4)
        words = rank["gradients"].get(f"{PREFIX}lora_embedding_A", torch.zeros(1, 99))
        assert not words[:, 99:].any()  # those of the padding
        found = {name: one[:, :99] if "embedding_A" in name else one for name, one in rank["gradients"].items()}
        assert largest_difference(found, expected["gradients"]) < 1e-4


def test_an_export_comes_back_bit_for_bit(folder, results):
    once, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapters", "back"))
    assert once.keys() - again.keys() <= {f"{PREFIX}base_layer.weight"}
    assert all(torch.equal(once[name], one) for name, one in again.items())
    lora = LoraSettings(rank=RANK, **CASES[results[0]["case"]][1])
    number = num_adapter_parameters(read_architecture(str(folder / "base")), lora)
    assert number == sum(one.numel() for one in again.values())


def test_exports_of_a_run_compute_what_pefts_three_steps_give(folder, results):
    expected, ranks = results
    logits, off = (
        torch.cat([rank["tp2"][name] for rank in ranks], dim=-1)[:, :99] for name in ("logits", "logits off")
    )
    base = load_model(folder / "base")
    with torch.no_grad():
        assert (base(TOKENS).logits[0] - off).abs().max() < 1e-4
        merged = load_model(folder / "merged")(TOKENS).logits[0]
        adapted = PeftModel.from_pretrained(base, str(folder / "peft"))(TOKENS).logits[0]
    for found in (merged, adapted):
        assert (found - logits).abs().max() < 1e-4
    assert (logits - expected["logits after"]).abs().max() < 2e-3
    assert (expected["logits"] - logits).abs().max() > 1e-2, "training should have changed the model"
    if expected["case"] == "tied embedding":
        before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
        assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
        assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        assert not read_architecture(str(folder / "merged")).tied_embeddings
