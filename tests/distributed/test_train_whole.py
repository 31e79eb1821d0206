"""Embedding and head trained whole beside adapters: as PEFT's modules_to_save computes and learns them, on every layout."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from megatron_sstoken.conversion.peft import PeftFolder, from_peft
from tests.helpers.adapters import loss_of_first_batch
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import go_on, load_model, make_model, make_samples, make_settings, make_store, make_trainer
from tests.reference.hf_reference import Objective, loss_and_gradients

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings(
        "ignore:Model has `tie_word_embeddings=True`"
    ),  # PEFT's, of what is shown here to be right
]

TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))
RANK, ALPHA, TARGETS = 3, 5.0, ["q_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]
CASES = {"tied": (True, BOTH), "apart": (False, BOTH), "head": (False, ["lm_head"])}
"""Name → whether the base ties both, and what is trained whole."""
RUNS = {
    ("tied", "pp2"): {"parallel__pipeline": 2},
    ("apart", "tp2"): {"parallel__tensor": 2, "parallel__sequence": True},
}
MORE_RUNS = {
    ("tied", "tp2"): {"parallel__tensor": 2},
    ("apart", "pp2"): {"parallel__pipeline": 2},
    ("head", "pp2"): {"parallel__pipeline": 2, "training__recompute": "full"},
}
"""Case and layout → its settings; the second are looked at by slow tests."""
RESUMED = {("tied", "pp2"), ("tied", "tp2"), ("apart", "pp2")}
NUM_STEPS, SAVED_AT = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and for each case a base, PEFT's adapters that do something, and what PEFT makes of them."""
    path = tmp_path_factory.mktemp("whole")
    samples = make_samples(8, seed=3, longest=30)
    make_store(path / "data", samples)
    for case, (tied, modules) in CASES.items():
        make_model(path / case / "base", "llama", seed=1, tie_word_embeddings=tied)
        torch.manual_seed(7)
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=modules, task_type="CAUSAL_LM"
        )
        model = get_peft_model(load_model(path / case / "base"), config)
        noise = 0.1 * torch.randn(99, 32)
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    new = parameter + noise if parameter.shape == noise.shape else 0.3 * torch.randn_like(parameter)
                    parameter.copy_(new)
        if tied:
            table = model.get_input_embeddings().weight.detach().clone()
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.shape == table.shape:
                    parameter.data.copy_(table)
        model.save_pretrained(path / case / "adapters")
        loss, gradients = loss_and_gradients(model, samples, Objective())
        with torch.no_grad():
            logits = model(TOKENS).logits[0]
        torch.save({"loss": loss, "gradients": gradients, "logits": logits}, path / case / "expected.pt")
    return path


def convert(rank, folder):
    for case, (_, modules) in CASES.items():
        _, lora = from_peft(f"{folder}/{case}/adapters", f"{folder}/{case}/start", hf_path=f"{folder}/{case}/base")
        assert (lora.rank, lora.targets, lora.train_whole) == (RANK, TARGETS, modules)


def logits_of(model):
    """[tokens, words / tensor size] on the last stage, else None; all ranks call it."""
    from megatron_sstoken.model.attention import sample_bounds

    if model.layout.pipeline_size > 1:
        return None
    model.train(False)
    length = TOKENS.shape[1]
    with torch.no_grad():
        places, bounds = torch.arange(length).unsqueeze(0), sample_bounds([length])
        return model.unwrapped[0](TOKENS, places, None, packed_seq_params=bounds)[0]


def train(rank, folder, runs):
    """For each run: loss and gradients of the first batch; losses of steps, and of those of a run resumed in between."""
    return {run: train_one(folder, *run) for run in runs}


def train_one(folder, case, layout_name):
    from megatron_sstoken.parallel import reset_layout

    def trainer_of(directory):
        settings = make_settings(
            f"{folder}/{case}/base",
            f"{folder}/data",
            model__checkpoint=f"{folder}/{case}/start",
            checkpoint__directory=directory,
            checkpoint__keep=0,
            data__shuffle=False,
            selection__method="full",
            training__steps=NUM_STEPS,
            optimizer__learning_rate=1e-2,
            lora__rank=RANK,
            lora__alpha=ALPHA,
            lora__targets=TARGETS,
            lora__train_whole=CASES[case][1],
            **(RUNS | MORE_RUNS)[case, layout_name],
        )
        return make_trainer(settings)

    directory = f"{folder}/{case}/{layout_name}"
    trainer = trainer_of(directory)
    model, layout = trainer.model, trainer.layout
    loss = loss_of_first_batch(trainer)
    trained = {name: one for name, one in model.unwrapped[0].named_parameters() if one.requires_grad}
    found = {
        "loss": loss,
        "gradients": {name: one.main_grad.clone() for name, one in trained.items() if model.is_tuned(name)},
        "others": [name for name in trained if not model.is_tuned(name)],
        "logits before": logits_of(model),
    }
    model.train(True)
    found["losses"] = go_on(trainer, (SAVED_AT, NUM_STEPS))
    found["logits"] = logits_of(model)
    reset_layout()
    if (case, layout_name) not in RESUMED:
        return found
    if layout.rank == 0:
        shutil.copytree(f"{directory}/step_{SAVED_AT:07d}", f"{directory}-again/step_{SAVED_AT:07d}")
    torch.distributed.barrier()
    found["resumed"] = go_on(trainer_of(f"{directory}-again"), (SAVED_AT, NUM_STEPS))
    reset_layout()
    return found


def export(rank, folder):
    from megatron_sstoken.conversion.hf import to_hf

    for case, layout in RUNS:
        to_hf(f"{folder}/{case}/{layout}", f"{folder}/{case}/peft")
        to_hf(f"{folder}/{case}/{layout}", f"{folder}/{case}/merged", merge=True)
    from_peft(f"{folder}/tied/peft", f"{folder}/tied/start again")
    to_hf(f"{folder}/tied/start again", f"{folder}/tied/peft again")


@pytest.fixture(scope="module")
def converted(folder):
    run_distributed(convert, 1, str(folder))
    return folder


@pytest.fixture(scope="module")
def results(converted):
    return run_distributed(train, 2, str(converted), list(RUNS))


@pytest.fixture(scope="module")
def more_results(converted):
    return run_distributed(train, 2, str(converted), list(MORE_RUNS))


@pytest.fixture(scope="module")
def exported(converted, results):
    run_distributed(export, 1, str(converted))
    return converted


@pytest.mark.parametrize(
    "run", [*RUNS, *(pytest.param(run, marks=pytest.mark.slow) for run in MORE_RUNS)], ids="-".join
)
def test_loss_gradients_and_steps(folder, request, run):
    results = request.getfixturevalue("results" if run in RUNS else "more_results")
    (case, layout), ranks = run, [rank[run] for rank in results]
    expected = torch.load(folder / case / "expected.pt", weights_only=True)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(expected["loss"], abs=1e-5) and rank["others"] == []
        assert rank.get("resumed") == (rank["losses"][SAVED_AT:] if run in RESUMED else None)
        assert rank["losses"][-1] < rank["losses"][0]
    embedding, head = "embedding.word_embeddings.weight", "output_layer.weight"
    wanted = {module: 0 for module in CASES[case][1]}
    for name, gradient in expected["gradients"].items():
        for module in wanted:
            if module in name:
                wanted[module] = wanted[module] + gradient
    if case == "tied":  # PEFT may hold two copies
        wanted = {"embed_tokens": sum(wanted.values())}
    for module, gradient in wanted.items():
        name = embedding if module == "embed_tokens" else head
        parts = [rank["gradients"][name] for rank in ranks if name in rank["gradients"]]
        assert len(parts) == (2 if layout == "tp2" else 1)
        found = torch.cat(parts)[:99]
        assert (found - gradient).abs().max() < 1e-4 * gradient.abs().max(), module
    if run == ("tied", "pp2"):  # the last stage has a copy
        assert torch.allclose(ranks[0]["gradients"][embedding], ranks[1]["gradients"][head])
    if layout == "tp2":
        logits = torch.cat([rank["logits before"] for rank in ranks], dim=-1)[:, :99]
        assert (logits - expected["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["tied", "apart"])
def test_exports_compute_the_same(folder, results, exported, case):
    place = folder / case
    with torch.no_grad():
        merged = load_model(place / "merged")(TOKENS).logits[0]
        adapted = PeftModel.from_pretrained(load_model(place / "base"), str(place / "peft"))(TOKENS).logits[0]
    assert (merged - adapted).abs().max() < 1e-4
    expected = torch.load(place / "expected.pt", weights_only=True)["logits"]
    assert (expected - merged).abs().max() > 1e-2, "training should have changed the model"
    if case == "apart":
        logits = torch.cat([rank[case, "tp2"]["logits"] for rank in results], dim=-1)[:, :99]
        assert (merged - logits).abs().max() < 1e-4
    assert json.loads((place / "peft" / "adapter_config.json").read_text())["modules_to_save"] == BOTH


def test_an_export_comes_back_bit_for_bit(exported):
    names = ("peft", "peft again", "adapters")
    once, again, pefts = (load_file(exported / "tied" / name / "adapter_model.safetensors") for name in names)
    assert once.keys() == again.keys() == pefts.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_what_a_tied_base_cannot_be_is_refused(folder, tmp_path):
    shutil.copytree(folder / "head" / "adapters", tmp_path / "half")
    with pytest.raises(ValueError, match="parts embedding and head, which are one in the base"):
        PeftFolder(str(tmp_path / "half"))._require_both()
    shutil.copytree(folder / "apart" / "adapters", tmp_path / "two")
    with pytest.raises(ValueError, match="embedding and head differ, which are one in the base"):
        PeftFolder(str(tmp_path / "two"))._require_one_table()
