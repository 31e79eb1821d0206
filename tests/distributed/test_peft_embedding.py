"""The embedding's adapter computes and learns what PEFT's does, on every layout, comes from its folders and goes back."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_sstoken.conversion.peft import from_peft
from tests.helpers.adapters import logits_of, train_peft
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import go_on, load_model, make_model, make_samples, make_settings, make_store, make_trainer
from tests.reference.hf_reference import Objective, loss_and_gradients

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),  # PEFT's, of what it saves, too
]

TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))
RANK, ALPHA, LEARNING_RATE, NUM_STEPS, SAVED_AT = 3, 5.0, 1e-2, 3, 2
TARGETS = ["q_proj", "embed_tokens"]
PREFIX = "base_model.model.model.embed_tokens."
LAYOUTS = {
    "tp2": {"parallel__tensor": 2},
    "tp2-sequence": {"parallel__tensor": 2, "parallel__sequence": True, "training__recompute": "full"},
    "pp2": {"parallel__pipeline": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that multiplies its embedding, data, PEFT's adapters that do something, and what PEFT makes of them."""
    path = tmp_path_factory.mktemp("embedding")
    make_model(path / "base", "granite", seed=1, tie_word_embeddings=False)
    samples = make_samples(8, seed=3, longest=30)
    make_store(path / "data", samples)
    torch.manual_seed(7)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(path / "base"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path / "adapters")
    loss, gradients = loss_and_gradients(model, samples, Objective())
    gradients = {name.split(".")[-2]: one for name, one in gradients.items() if "lora_embedding" in name}
    with torch.no_grad():
        found = {"loss": loss, "gradients": gradients, "logits": model(TOKENS).logits[0]}
    found["losses"] = train_peft(model, samples, LEARNING_RATE, NUM_STEPS)
    with torch.no_grad():
        found["logits after"] = model(TOKENS).logits[0]
    torch.save(found, path / "expected.pt")
    return path


def convert(rank, folder):
    from megatron_sstoken.conversion.hf import to_hf

    _, lora = from_peft(f"{folder}/adapters", f"{folder}/start", hf_path=f"{folder}/base")
    assert (lora.rank, lora.targets) == (RANK, TARGETS)
    to_hf(f"{folder}/start", f"{folder}/back")
    shutil.copytree(f"{folder}/adapters", f"{folder}/other")
    weights = load_file(f"{folder}/other/adapter_model.safetensors")
    weights[f"{PREFIX}base_layer.weight"][5, 6] += 1
    save_file(weights, f"{folder}/other/adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=f"{PREFIX}base_layer.weight is not the base's embedding, .*: merge the adapters"
    ):
        from_peft(f"{folder}/other", f"{folder}/out", hf_path=f"{folder}/base")


def train(rank, folder):
    return {name: train_one(folder, name, layout) for name, layout in LAYOUTS.items()}


def train_one(folder, name, layout):
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.metrics import summarize
    from megatron_sstoken.training.selector import selector_of, train_on_selected

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
            "lora__targets": TARGETS,
        }
        return make_trainer(make_settings(f"{folder}/base", f"{folder}/data", **(values | changes)))

    directory = f"{folder}/{name}"
    trainer = trainer_of(directory, **layout)
    model = trainer.model
    model.zero_gradients()
    selector = selector_of(trainer.settings, trainer.layout, gamma=0.5, step=0)
    reports = train_on_selected(model, trainer.loader.load(0), selector, whole_gradients=True)
    found = {"loss": summarize(reports, model.architecture, trainer.layout).loss_selected, "gradients": None}
    if trainer.layout.is_first_stage:
        adapter = model.unwrapped[0].embedding.adapters
        found["gradients"] = [adapter.lora_A.weight.main_grad.clone(), adapter.lora_B.main_grad.clone()]
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
    to_hf(f"{folder}/tp2", f"{folder}/merged", merge=True)


@pytest.fixture(scope="module")
def results(folder):
    run_distributed(convert, 1, str(folder))
    found = run_distributed(train, 2, str(folder))
    run_distributed(export, 1, str(folder))
    return torch.load(folder / "expected.pt", weights_only=True), found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_steps_equal_pefts(results, layout):
    expected, ranks = results[0], [rank[layout] for rank in results[1]]
    for rank in ranks:
        assert rank["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert rank.get("resumed", rank["losses"][SAVED_AT:]) == pytest.approx(expected["losses"][SAVED_AT:], abs=1e-4)
    held = [rank["gradients"] for rank in ranks if rank["gradients"]]
    assert len(held) == (1 if layout == "pp2" else 2)
    first, second = expected["gradients"]["lora_embedding_A"], expected["gradients"]["lora_embedding_B"]
    words = torch.cat([one[0] for one in held])
    assert (words[:99].t() - first).abs().max() < 1e-4 * first.abs().max() and not words[99:].any()
    for _, one in held:
        assert (one - second).abs().max() < 1e-4 * second.abs().max()


def test_an_export_comes_back_bit_for_bit(folder, results):
    once, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapters", "back"))
    assert once.keys() - again.keys() == {f"{PREFIX}base_layer.weight"}
    assert all(torch.equal(once[name], one) for name, one in again.items())


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
