"""Adapters of experts, and of what stands beside them in such models, compute and learn what PEFT's do, on every layout, come
from its folders and go back.

PEFT holds the adapters of gate and up as one of twice the rank, of all experts; the reference keeps the blocks of its B apart.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_sstoken.config import LoraSettings
from megatron_sstoken.conversion.peft import from_peft
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.lora_places import num_adapter_parameters
from tests.helpers.adapters import (
    gather_gradients,
    logits_of,
    loss_of_first_batch,
    named_adapters,
    set_adapters,
    train_peft,
)
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference
from tests.helpers.workbench import go_on, load_model, make_model, make_samples, make_settings, make_store, make_trainer
from tests.reference.hf_reference import Objective, loss_and_gradients

pytestmark = pytest.mark.timeout(400)

TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))
RANK, ALPHA, LEARNING_RATE, NUM_STEPS, SAVED_AT = 3, 5.0, 1e-2, 3, 2
TARGETS = ["o_proj", "gate_proj", "up_proj", "down_proj"]
LATENTS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
FAMILIES = {
    "mixtral": ["o_proj", "w1", "w2", "w3"],
    "qwen3_moe": TARGETS,
    "glm4_moe": TARGETS,
    "deepseek_v3": [*TARGETS, *LATENTS],
    "gpt_oss": TARGETS,
    "qwen3_next": TARGETS,
}
"""Family → the names of its targets in its folders."""
CHANGES: dict[str, dict] = {
    "gpt_oss": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {
        "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1
    },
}  # fmt: skip
BESIDE = [f"{block}.{name}.weight" for block in ("mlp", "shared_experts", "shared_expert") for name in TARGETS[1:]]
"""Linears of dense layers, and of shared experts: by names of linears PEFT finds in a mixture those of experts alone."""
STACKS = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "qwen3_moe": ["experts.down_proj"],
    "glm4_moe": ["experts.gate_up_proj", "experts.down_proj", *BESIDE],
    "deepseek_v3": ["experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["experts.gate_up_proj", "experts.down_proj"],
    "qwen3_next": ["experts.gate_up_proj", "experts.down_proj", *BESIDE],
}
"""Family → the tensors of all experts that have an adapter, each of its own, and in one the linears beside them."""
NUM_EXPERTS = 4
RUNS = {
    ("mixtral", "ep2"): {"parallel__expert": 2},
    ("qwen3_moe", "tp2"): {"parallel__tensor": 2, "parallel__sequence": True, "training__recompute": "full"},
    ("qwen3_moe", "tp2-ep2"): {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2},
    ("glm4_moe", "ep2"): {"parallel__expert": 2},
    ("gpt_oss", "ep2"): {"parallel__expert": 2},
    ("qwen3_next", "ep2"): {"parallel__expert": 2},
    ("deepseek_v3", "tp2-ep2"): {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2},
}
"""Family and layout → its settings."""
RESUMED = {("mixtral", "ep2"), ("glm4_moe", "ep2")}
"""Those that are resumed on two stages."""
EXPORTED = [family for family, layout in RUNS if layout == "ep2"]


def per_expert(name, tensor, family):
    """A matrix of PEFT's model, of all experts or of a linear → those of each linear, by the names of `TARGETS`."""
    if ".mlp.experts." not in name:
        yield name.replace(".default", ""), tensor
        return
    layer, matrix = name.split(".mlp.experts.")[0], "lora_A" if "lora_A" in name else "lora_B"
    parts = ["gate_proj", "up_proj"] if "base_layer" in name else ["down_proj"]
    if matrix == "lora_A":  # [experts · parts · rank, in]
        found = tensor.unflatten(0, (NUM_EXPERTS, len(parts), RANK))
        blocks = {(part, e): found[e, number] for number, part in enumerate(parts) for e in range(NUM_EXPERTS)}
    else:  # [parts · out, parts · rank · experts]
        found = tensor.unflatten(1, (len(parts), RANK, NUM_EXPERTS))
        found = outputs_of_parts(found, len(parts), family)
        blocks = {(part, e): found[n, :, n, :, e] for n, part in enumerate(parts) for e in range(NUM_EXPERTS)}
    for (part, expert), block in blocks.items():
        yield f"{layer}.mlp.experts.{expert}.{part}.{matrix}.weight", block.clone()


def outputs_of_parts(tensor, number, family):
    """[outputs, …] → [parts, outputs of each, …]; in GPT-OSS outputs of gate and up take turns."""
    return (
        tensor.unflatten(0, (-1, number)).transpose(0, 1) if family == "gpt_oss" else tensor.unflatten(0, (number, -1))
    )


def by_linear(tensors, family):
    """PEFT's tensors by the names of the family's folders, which GPT-OSS has none of for parts of its tensors."""
    found = dict(pair for name, tensor in tensors.items() for pair in per_expert(name, tensor, family))
    if family != "mixtral":
        return found
    names = dict(zip(TARGETS, ("o_proj", "w1", "w3", "w2"), strict=True))
    return {
        ".".join(
            names.get(part, part) for part in name.replace(".mlp.experts.", ".block_sparse_moe.experts.").split(".")
        ): t
        for name, t in found.items()
    }


def peft_model(folder, family, targets):
    """PEFT's model with random adapters, its trained parameters, and masks of the blocks that its B of gate and up have."""
    torch.manual_seed(7)
    beside = BESIDE if family in ("glm4_moe", "deepseek_v3", "qwen3_next") else None
    options = {"target_modules": targets, "target_parameters": beside, "task_type": "CAUSAL_LM"}
    if family == "gpt_oss":  # whose names mean nothing to PEFT
        options |= {"target_modules": ["o_proj"], "target_parameters": STACKS[family]}
        options |= {"rank_pattern": {"gate_up_proj": 2 * RANK}, "alpha_pattern": {"gate_up_proj": 2 * ALPHA}}
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, **options)
    model = get_peft_model(load_model(folder / family), config)
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    masks = {}
    for name, parameter in parameters.items():
        torch.nn.init.normal_(parameter, std=0.3)
        if "base_layer.lora_B" in name:
            masks[name] = torch.zeros_like(parameter)
            blocks = outputs_of_parts(masks[name].unflatten(1, (2, -1)), 2, family)
            blocks[0, :, 0], blocks[1, :, 1] = 1, 1
            parameter.data.mul_(masks[name])
    return model, parameters, masks


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Folder with models, data and adapters of PEFT; family → what PEFT makes of them, and of three steps with them."""
    folder = tmp_path_factory.mktemp("experts")
    samples = make_samples(8, seed=3, longest=30)
    make_store(folder / "data", samples)
    expected = {}
    for family, targets in FAMILIES.items():
        make_model(folder / family, family, seed=1, **CHANGES.get(family, {}))
        model, parameters, masks = peft_model(folder, family, targets)
        adapters = by_linear({name: one.detach().clone() for name, one in parameters.items()}, family)
        loss, gradients = loss_and_gradients(model, samples, Objective())
        with torch.no_grad():
            logits = model(TOKENS).logits[0]
        if family == "gpt_oss":
            model.save_pretrained(folder / f"{family}-linears")
        losses = train_peft(model, samples, LEARNING_RATE, NUM_STEPS, masks)
        with torch.no_grad():
            after = model(TOKENS).logits[0]
        expected[family] = {
            "adapters": adapters,
            "loss": loss,
            "gradients": by_linear(gradients, family),
            "logits": logits,
            "losses": losses,
            "logits after": after,
        }
    for family in FAMILIES:
        shared = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["o_proj"], target_parameters=STACKS[family])
        model = get_peft_model(load_model(folder / family), shared)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / f"{family}-stacks")
        with torch.no_grad():
            expected[family]["logits of stacks"] = model(TOKENS).logits[0]
        if family != "gpt_oss":
            save_by_linear(folder / f"{family}-linears", expected[family]["adapters"], FAMILIES[family])
    torch.save({family: found["adapters"] for family, found in expected.items()}, folder / "adapters.pt")
    return folder, expected


def save_by_linear(folder, adapters, targets):
    """The folder that PEFT has made where experts are linears."""
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in adapters.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def train(rank, folder):
    adapters = torch.load(f"{folder}/adapters.pt", weights_only=True)
    return {run: train_one(folder, adapters, *run) for run in RUNS}


def targets_of(family):
    return TARGETS if family == "mixtral" else FAMILIES[family]


def trainer_of(folder, family, layout, directory):
    values = {
        "lora__rank": RANK,
        "lora__alpha": ALPHA,
        "lora__targets": targets_of(family),
        "data__shuffle": False,
        "selection__method": "full",
        "training__steps": NUM_STEPS,
        "optimizer__learning_rate": LEARNING_RATE,
        "checkpoint__directory": directory,
        "checkpoint__keep": 0,
    }
    return make_trainer(make_settings(f"{folder}/{family}", f"{folder}/data", **(values | layout)))


def train_one(folder, adapters, family, layout_name):
    from megatron_sstoken.parallel import reset_layout

    settings, directory = RUNS[family, layout_name], f"{folder}/{family}-{layout_name}"
    trainer = trainer_of(folder, family, settings, directory)
    model, layout = trainer.model, trainer.layout
    drawn = {name: one.detach().clone() for name, (one, _) in named_adapters(model).items() if "lora_A" in name}
    set_adapters(model, adapters[family])
    trainer.optimizer.reload_model_params()
    found = {"loss": loss_of_first_batch(trainer), "gradients": gather_gradients(model), "drawn": drawn}
    found["losses"] = go_on(trainer, (SAVED_AT, NUM_STEPS) if "ep2" in layout_name and family != "deepseek_v3" else ())
    if layout_name == "ep2":
        found["logits"] = logits_of(model, TOKENS)
    if (family, layout_name) in RESUMED:
        reset_layout()
        if layout.rank == 0:
            shutil.copytree(f"{directory}/step_{SAVED_AT:07d}", f"{directory}-again/step_{SAVED_AT:07d}")
        torch.distributed.barrier()
        found["resumed"] = go_on(trainer_of(folder, family, {"parallel__pipeline": 2}, f"{directory}-again"), ())
    reset_layout()
    return found


@pytest.fixture(scope="module")
def results(bench):
    return run_distributed(train, 2, str(bench[0]), timeout=240)


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_loss_gradients_and_steps_equal_pefts(bench, results, run):
    expected = bench[1][run[0]]
    for rank in results:
        found = rank[run]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        worst = largest_difference(found["gradients"], expected["gradients"])
        print(f"{'-'.join(run):<20} gradients ±{worst:.1e}")
        assert worst < 1e-4
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        if "resumed" in found:
            assert found["resumed"] == pytest.approx(expected["losses"][SAVED_AT:], abs=1e-4)


def test_matrices_are_drawn_alike_on_every_layout_and_differ_between_experts(results):
    by_layout = [{**results[0][run]["drawn"], **results[1][run]["drawn"]} for run in RUNS if run[0] == "qwen3_moe"]
    assert all(torch.equal(one, by_layout[1][name]) for name, one in by_layout[0].items() if ".experts." in name)
    first, second = (
        by_layout[0][f"base_model.model.model.layers.0.mlp.experts.{n}.up_proj.lora_A.weight"] for n in (0, 1)
    )
    assert not torch.equal(first, second)


def convert(rank, folder):
    from megatron_sstoken.conversion.hf import to_hf

    for family in FAMILIES:
        for form in ("linears", "stacks"):
            from_peft(f"{folder}/{family}-{form}", f"{folder}/{family}-{form}-start", hf_path=f"{folder}/{family}")
            to_hf(f"{folder}/{family}-{form}-start", f"{folder}/{family}-{form}-back")
    for family in EXPORTED:
        to_hf(f"{folder}/{family}-ep2", f"{folder}/{family}-merged", merge=True)
        to_hf(f"{folder}/{family}-ep2", f"{folder}/{family}-peft")


@pytest.fixture(scope="module")
def converted(bench, results):
    run_distributed(convert, 1, str(bench[0]))
    return bench


def logits_with(folder, family, adapters):
    with torch.no_grad():
        return PeftModel.from_pretrained(load_model(folder / family), str(folder / adapters))(TOKENS).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_both_forms_are_read_and_come_back(converted, family):
    folder, expected = converted
    once, again = (
        load_file(folder / f"{family}-{name}" / "adapter_model.safetensors") for name in ("linears", "linears-back")
    )
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    lora = LoraSettings(rank=RANK, targets=targets_of(family))
    number = num_adapter_parameters(read_architecture(str(folder / family)), lora)
    assert number == sum(int(one.count_nonzero()) for one in once.values())
    for form, wanted in (("linears", "logits"), ("stacks", "logits of stacks")):
        assert (logits_with(folder, family, f"{family}-{form}-back") - expected[family][wanted]).abs().max() < 1e-4, (
            form
        )


@pytest.mark.parametrize("family", EXPORTED)
def test_exports_of_a_run_compute_what_pefts_three_steps_give(converted, results, family):
    folder, expected, ours = converted[0], converted[1][family], results[0][family, "ep2"]["logits"][:, :99]
    with torch.no_grad():
        merged = load_model(folder / f"{family}-merged")(TOKENS).logits[0]
    adapted = logits_with(folder, family, f"{family}-peft")
    assert (ours - expected["logits after"]).abs().max() < 2e-3
    assert (merged - ours).abs().max() < 1e-4 and (adapted - ours).abs().max() < 1e-4
    assert (merged - expected["logits"]).abs().max() > 1e-2, "training should have changed the model"
