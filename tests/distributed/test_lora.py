"""Adapters compute and learn what PEFT's do, on every layout; the base is frozen, costs nothing, and scores history.

The reference is `peft` on the Hugging Face model, with the same weights and the same adapters (B not zero). Everything is
run in processes alone and in pairs; the tests look at what they returned.
"""

import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from megatron_sstoken.config import SettingsError
from megatron_sstoken.validate.run import plan_run
from tests.helpers.adapters import gather_gradients, logits_of, loss_of_first_batch, named_adapters, set_adapters
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference
from tests.helpers.workbench import (
    LAYOUTS,
    go_on,
    load_model,
    make_model,
    make_samples,
    make_settings,
    make_store,
    make_trainer,
)
from tests.reference.hf_reference import Objective, loss_and_gradients

pytestmark = pytest.mark.timeout(400)

RANK, ALPHA = 3, 5.0
SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA = ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj"]  # the part between the last two has none
TWO_RANKS = {name: parallel for name, (num_ranks, parallel) in LAYOUTS.items() if num_ranks == 2}
TWO_RANKS["cp2"] = {"parallel.context": 2}
TWO_KEY_HEADS = "delta nets, gates"
"""The delta nets cannot be dealt out to more ranks than two."""
# name → (family, targets, recompute, packed)
CASES = {
    "llama": ("llama", ALL, "none", True),
    "llama, some": ("llama", SOME, "selective", False),
    "qwen2, full recompute": ("qwen2", ALL, "full", True),
    TWO_KEY_HEADS: ("qwen3_5_text", ["q_proj", "k_proj", "up_proj", *DELTA], "selective", True),
    "one key head": ("one key head", ALL, "none", True),
    "one key head, no queries": ("one key head", ["k_proj", "o_proj"], "none", True),
}
CUT = ("one key head", "one key head, no queries")
"""Tensor parallel cuts through the rows of their one query group."""
EXPORTED = {
    "fused": ("phi3", ALL),
    "fused, some": ("phi3", ["v_proj", "q_proj", "up_proj"]),
    "layers not alike": ("glm4_moe", ["q_proj", "o_proj"]),
    "latents": ("deepseek_v3", ["o_proj"]),
    "delta nets, gates": ("qwen3_5_text", [*ALL, *DELTA]),
    "delta nets by head": ("qwen3_next", ["in_proj_qkvz", "in_proj_ba", "out_proj", "k_proj"]),
    "biases, tensors of all experts": ("gpt_oss", ["q_proj", "v_proj", "o_proj"]),
}
"""Adapters that are exported otherwise than Llama's: name → family, targets."""
STABILIZED = {"qwen2, full recompute"}
"""The cases of rsLoRA; the run that is exported is one, too."""
NUM_STEPS, SAVED_AT = 4, 2


def cases_of(parallel):
    """All cases where nothing is sharded; on two processes those that differ there."""
    if not parallel:
        return list(CASES)
    left_out = {"llama, some", *(() if "parallel.tensor" in parallel else CUT)}
    left_out |= {TWO_KEY_HEADS} if parallel.get("parallel.tensor", 1) > 2 else set()
    return [name for name in CASES if name not in left_out]


TOKENS = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(0))


def lora_settings(folder, family="llama", targets=ALL, **changes):
    values = {
        "lora__rank": RANK,
        "lora__alpha": ALPHA,
        "lora__targets": targets,
        "data__shuffle": False,
        "selection__method": "full",
        "training__steps": NUM_STEPS,
        "optimizer__learning_rate": 1e-2,
    }
    return make_settings(f"{folder}/{family}", f"{folder}/data", **(values | changes))


# What the processes do


def on_one_process(rank, folder, adapters):
    return {
        "gradients": {"single": measure_gradients(folder, adapters, {})},
        "exported": {name: train_and_export(folder, name) for name in EXPORTED},
    }


def train_and_export(folder, name):
    """Train adapters, and write both exports; the logits of the trained model."""
    from megatron_sstoken.conversion.hf import to_hf
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.loop import save, training_step

    directory, (family, targets) = f"{folder}/{name}", EXPORTED[name]
    trainer = make_trainer(lora_settings(folder, family, targets, checkpoint__directory=directory))
    for number in range(2):
        training_step(trainer, number)
        trainer.step = number + 1
    save(trainer)
    logits = logits_of(trainer.model, TOKENS)
    reset_layout()
    to_hf(directory, f"{directory}-peft")
    to_hf(directory, f"{directory}-merged", merge=True)
    return logits


def gradients_on_two(rank, folder, adapters):
    return {name: measure_gradients(folder, adapters, parallel) for name, parallel in TWO_RANKS.items()}


def gradients_on_four(rank, folder, adapters):
    return measure_gradients(folder, adapters, {"parallel.tensor": 4, "parallel.sequence": True})


def histories_on_two(rank, folder, adapters):
    return {name: compare_histories(folder, adapters, TWO_RANKS[name]) for name in ("tp2-sequence", "pp2", "cp2")}


def on_two_processes(folder, adapters):
    """Each in fresh processes: those of before would keep the threads of every layout, which each message wakes."""
    found = {
        "gradients": run_distributed(gradients_on_two, 2, folder, adapters),
        "memory and masks": run_distributed(observe_training, 2, folder),
        "histories": run_distributed(histories_on_two, 2, folder, adapters),
        "runs": run_distributed(train_and_resume, 2, folder),
    }
    return [dict(zip(found, parts, strict=True)) for parts in zip(*found.values(), strict=True)]


def export(rank, folder):
    """Write both exports; returns the stored tensors of the checkpoint: name → number of elements."""
    from megatron.core import dist_checkpointing

    from megatron_sstoken.conversion.hf import to_hf
    from megatron_sstoken.parallel import reset_layout

    to_hf(f"{folder}/dropout", f"{folder}/peft")
    to_hf(f"{folder}/dropout", f"{folder}/merged", merge=True)
    reset_layout()
    stored = dist_checkpointing.load_tensors_metadata(f"{folder}/dropout/step_{NUM_STEPS:07d}")
    return {name: math.prod(tensor.global_shape) for name, tensor in stored.items()}


def measure_gradients(folder, adapters, parallel):
    """For each case: loss, and gradients by PEFT's names."""
    from megatron_sstoken.parallel import reset_layout

    results = {}
    for case in cases_of(parallel):
        family, targets, recompute, packed = CASES[case]
        changes = {"training__recompute": recompute, "data__packing": packed, **parallel}
        changes["lora__rank_stabilized"] = case in STABILIZED
        settings = lora_settings(folder, family, targets, **changes)
        trainer = make_trainer(settings)
        set_adapters(trainer.model, adapters[case])
        results[case] = loss_of_first_batch(trainer), gather_gradients(trainer.model)
        reset_layout()
    return results


def observe_training(rank, folder):
    """What two steps leave in memory, and which masks dropout draws, with tensor parallel 2."""
    from megatron_sstoken.model.lora_targets import base_parameters
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.loop import training_step

    found = {}
    for name, changes in {
        "tp2": {},
        "tp2, full recompute": {"training__recompute": "full"},
        "tp2-sequence": {"parallel__sequence": True},
        "tp2-sequence, bf16": {"parallel__sequence": True, "training__precision": "bf16", "lora__dropout": 0.0},
    }.items():
        trainer = make_trainer(lora_settings(folder, **({"lora__dropout": 0.5, "parallel__tensor": 2} | changes)))
        model = trainer.model
        base = {name: parameter for chunk in model.unwrapped for name, parameter in base_parameters(chunk)}
        before = {key: parameter.detach().clone() for key, parameter in base.items()}
        drawn = {key: parameter.detach().clone() for key, (parameter, _) in named_adapters(model).items()}
        masks = draw_masks(model)
        losses = [training_step(trainer, number)[0].loss_selected for number in range(2)]
        inner = trainer.optimizer.chained_optimizers[0].optimizer
        found[name] = {
            "losses": losses,
            "base changed": [key for key, parameter in base.items() if not torch.equal(parameter, before[key])],
            "base with gradient": [
                key for key, parameter in base.items() if parameter.grad is not None or hasattr(parameter, "main_grad")
            ],
            "buffer": sum(buffer.grad_data.numel() for chunk in model.chunks for buffer in chunk.buffers),
            "state": sum(value.numel() for entry in inner.state.values() for value in entry.values() if value.dim()),
            "size": sum(parameter.numel() for parameter, _ in named_adapters(model).values()),
            "drawn": drawn,
            "adapters": {
                key: (axis, parameter.detach().clone()) for key, (parameter, axis) in named_adapters(model).items()
            },
            "masks": masks,
        }
        reset_layout()
    return found


def draw_masks(model):
    """Dropout as the first layer's linears draw it, inside the fork that megatron runs layers in under sequence parallel."""
    from megatron.core import tensor_parallel

    attention = model.unwrapped[0].decoder.layers[0].self_attention
    sequence = model.config.sequence_parallel
    with tensor_parallel.get_cuda_rng_tracker().fork() if sequence else nullcontext():
        return {
            "linear_qkv": attention.linear_qkv._drop(torch.ones(20, 1, 8), replicated=not sequence),
            "linear_proj": attention.linear_proj._drop(torch.ones(20, 1, 8), replicated=False),
        }


def compare_histories(folder, adapters, parallel):
    """A step with stored history losses of the base, and one with the adapters switched off; the adapters are not zero.

    Returns for each the loss and this rank's (history losses, selected).
    """
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.metrics import summarize
    from megatron_sstoken.training.selector import selector_of, train_on_selected

    results = []
    for source in ("frozen", "adapters_off"):
        settings = lora_settings(
            folder, history__source=source, selection__method="sstoken", selection__scope="batch", **parallel
        )
        trainer = make_trainer(settings)
        set_adapters(trainer.model, adapters["llama"])
        selector = selector_of(settings, trainer.layout, gamma=0.5, step=0, history=trainer.history)
        reports = train_on_selected(trainer.model, trainer.loader.load(0), selector)
        loss = summarize(reports, trainer.model.architecture, trainer.layout).loss_selected
        results.append((loss, [(report.history_loss, report.selection.mask) for report in reports]))
        reset_layout()
    return results


def train_and_resume(rank, folder):
    """Whole runs, and the same gone on with from a checkpoint in between, on the same and on another layout."""
    from megatron_sstoken.parallel import reset_layout

    def run(directory, **changes):
        values = {"history__source": "adapters_off", "selection__method": "sstoken", "checkpoint__directory": directory}
        trainer = make_trainer(lora_settings(folder, checkpoint__keep=0, **(values | changes)))
        losses = go_on(trainer, (SAVED_AT, NUM_STEPS))
        adapters = {name: parameter.detach().clone() for name, (parameter, _) in named_adapters(trainer.model).items()}
        logits = logits_of(trainer.model, TOKENS) if "dropout" in directory else None
        reset_layout()
        return {"losses": losses, "adapters": adapters, "logits": logits}

    def copy(source, target):
        if torch.distributed.get_rank() == 0:
            shutil.copytree(f"{source}/step_{SAVED_AT:07d}", f"{target}/step_{SAVED_AT:07d}")
        torch.distributed.barrier()

    dropped = {"lora__dropout": 0.3, "lora__rank_stabilized": True, "parallel__tensor": 2}
    found = {"dropout": run(f"{folder}/dropout", **dropped)}
    copy(f"{folder}/dropout", f"{folder}/dropout-again")
    found["dropout, resumed"] = run(f"{folder}/dropout-again", **dropped)
    cut = {"model__hf_path": f"{folder}/one key head"}
    found["plain"] = run(f"{folder}/plain", parallel__tensor=2, **cut)
    copy(f"{folder}/plain", f"{folder}/plain-pp2")
    found["plain, resumed on pp2"] = run(f"{folder}/plain-pp2", parallel__pipeline=2, **cut)
    return found


# What must come out


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Folder with models and data; for each case adapters by PEFT's names, PEFT's loss and gradients."""
    folder = tmp_path_factory.mktemp("lora")
    samples = make_samples(8, seed=3, longest=30)
    make_store(folder / "data", samples)
    for number, family in enumerate(
        ("llama", "qwen2", "phi3", "glm4_moe", "gpt_oss", "deepseek_v3", "qwen3_5_text", "qwen3_next")
    ):
        make_model(folder / family, family, seed=number + 1)
    make_model(folder / "one key head", "llama", seed=1, num_key_value_heads=1)
    adapters, expected = {}, {}
    for case, (family, targets, *_) in CASES.items():
        torch.manual_seed(7)
        stabilized = case in STABILIZED
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, use_rslora=stabilized, target_modules=targets, task_type="CAUSAL_LM"
        )
        model = get_peft_model(load_model(folder / family), config)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, std=0.3)
        adapters[case] = {name.replace(".default", ""): p.detach().clone() for name, p in parameters.items()}
        loss, gradients = loss_and_gradients(model, samples, Objective())
        expected[case] = loss, {name.replace(".default", ""): gradient for name, gradient in gradients.items()}
    return folder, adapters, expected


@pytest.fixture(scope="module")
def one(bench):
    (result,) = run_distributed(on_one_process, 1, *bench[:2])
    return result


@pytest.fixture(scope="module")
def two(bench):
    return on_two_processes(*bench[:2])


@pytest.fixture(scope="module")
def exported(bench, two):
    (stored,) = run_distributed(export, 1, bench[0])
    return bench[0], stored


@pytest.mark.parametrize("layout", ["single", *TWO_RANKS])
def test_loss_and_gradients_equal_pefts(bench, one, two, layout):
    results = one["gradients"][layout] if layout == "single" else two[0]["gradients"][layout]
    for case, (loss, gradients) in results.items():
        wanted_loss, wanted = bench[2][case]
        worst = largest_difference(gradients, wanted)
        print(f"{layout:<13} {case:<22} loss ±{abs(loss - wanted_loss):.1e}, gradients ±{worst:.1e}")
        assert loss == pytest.approx(wanted_loss, abs=1e-5), case
        assert worst < 1e-4, case


@pytest.mark.slow
def test_loss_and_gradients_equal_pefts_where_each_of_two_groups_is_cut(bench):
    results = run_distributed(gradients_on_four, 4, *bench[:2])[0]
    assert results.keys() > {"llama", "one key head"}
    for case, (loss, gradients) in results.items():
        assert loss == pytest.approx(bench[2][case][0], abs=1e-5), case
        assert largest_difference(gradients, bench[2][case][1]) < 1e-4, case


def test_base_is_frozen_and_costs_no_gradient_or_optimizer_memory(two):
    for rank in two:
        for name, seen in rank["memory and masks"].items():
            assert seen["base changed"] == [] and seen["base with gradient"] == [], name
            # Two moments of every element and nothing else; megatron pads its gradient buffer, 64 elements a parameter.
            assert seen["state"] == 2 * seen["size"], name
            assert seen["size"] <= seen["buffer"] <= seen["size"] + 64 * len(seen["adapters"]), name


def test_dropout_agrees_over_tensor_ranks_where_inputs_do(two):
    first, second = (rank["memory and masks"] for rank in two)
    for name in ("tp2", "tp2, full recompute", "tp2-sequence"):
        seen, other = first[name], second[name]
        same = {linear: torch.equal(mask, other["masks"][linear]) for linear, mask in seen["masks"].items()}
        assert same == {"linear_qkv": "sequence" not in name, "linear_proj": False}, name
        for key, (axis, matrix) in seen["adapters"].items():
            assert not torch.equal(matrix, seen["drawn"][key]), (name, key)
            if axis is None:  # a copy on every rank: equal gradients kept the copies equal
                assert torch.equal(matrix, other["adapters"][key][1]), (name, key)


def test_recompute_draws_the_same_masks_and_bf16_learns_alike(two):
    seen = two[0]["memory and masks"]
    assert seen["tp2, full recompute"]["losses"] == seen["tp2"]["losses"]
    for key, (_, matrix) in seen["tp2"]["adapters"].items():
        assert torch.equal(seen["tp2, full recompute"]["adapters"][key][1], matrix), key
    assert seen["tp2-sequence, bf16"]["losses"][0] == pytest.approx(seen["tp2-sequence"]["losses"][0], abs=0.02)


@pytest.mark.parametrize("layout", ["tp2-sequence", "pp2", "cp2"])
def test_history_with_adapters_off_equals_the_frozen_store(two, layout):
    num_compared = 0
    for rank in two:
        (stored_loss, stored), (scored_loss, scored) = rank["histories"][layout]
        assert scored_loss == pytest.approx(stored_loss, abs=1e-5)
        for (wanted, wanted_mask), (found, mask) in zip(stored, scored, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, equal_nan=True)
            assert torch.equal(mask, wanted_mask)
            num_compared += int((~found.isnan()).sum())
    assert num_compared > 50


def test_resumed_runs_go_on_as_if_never_stopped(two):
    for rank in two:
        runs = rank["runs"]
        whole_run, resumed = runs["dropout"], runs["dropout, resumed"]
        assert resumed["losses"] == whole_run["losses"][SAVED_AT:]
        for name, matrix in whole_run["adapters"].items():
            assert torch.equal(resumed["adapters"][name], matrix), name
        elsewhere = runs["plain, resumed on pp2"]["losses"]
        assert elsewhere == pytest.approx(runs["plain"]["losses"][SAVED_AT:], abs=1e-5)
        assert runs["plain"]["losses"][-1] < runs["plain"]["losses"][0] - 0.1


def test_checkpoints_hold_adapters_alone(bench, exported):
    folder, stored = exported
    num_parameters = sum(tensor.numel() for tensor in bench[1]["llama"].values())
    stored = {name: size for name, size in stored.items() if not name.startswith("random.")}
    assert [name for name in stored if ".adapters." not in name] == []
    assert sum(stored.values()) == 4 * num_parameters, "the adapters, the optimizer's copy of them and its two moments"
    assert load_file(folder / "peft" / "adapter_model.safetensors").keys() == bench[1]["llama"].keys()


def test_exported_adapters_and_merged_model_give_megatrons_logits(two, exported):
    folder, _ = exported
    logits = torch.cat([rank["runs"]["dropout"]["logits"] for rank in two], dim=-1)[:, :99]
    base = load_model(folder / "llama")
    with torch.no_grad():
        untrained = base(TOKENS).logits[0]
        merged = load_model(folder / "merged")(TOKENS).logits[0]
        adapted = PeftModel.from_pretrained(base, str(folder / "peft"))(TOKENS).logits[0]
    assert (logits - untrained).abs().max() > 1e-2, "training should have changed the model"
    assert (logits - merged).abs().max() < 1e-4
    assert (logits - adapted).abs().max() < 1e-4
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "llama")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("llama", "merged"))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(ALL)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_of_particular_linears_give_megatrons_logits(bench, one, name):
    folder, logits = bench[0], one["exported"][name][:, :99]
    base = load_model(folder / EXPORTED[name][0])
    with torch.no_grad():
        untrained = base(TOKENS).logits[0]
        merged = load_model(folder / f"{name}-merged")(TOKENS).logits[0]
        adapted = PeftModel.from_pretrained(base, str(folder / f"{name}-peft"))(TOKENS).logits[0]
    assert (logits - untrained).abs().max() > 1e-3, "training should have changed the model"
    assert (logits - merged).abs().max() < 1e-4
    assert (logits - adapted).abs().max() < 1e-4


def test_adapters_do_not_load_where_they_do_not_fit(exported):
    folder, _ = exported
    from megatron_sstoken.training.resume import resumable_checkpoint

    checkpoint = str(folder / "dropout" / f"step_{NUM_STEPS:07d}")
    for changes, message in {
        "rank": ({"lora__rank": 4}, "lora.rank=3, now 4: use the same"),
        "targets": ({"lora__targets": SOME}, "lora.targets=.* now .*: use the same"),
        "none": (
            {"lora__rank": 0},
            "and lora.rank=0 makes none: set lora.rank=3, lora.alpha=5, lora.rank_stabilized=true and",
        ),
        "scale": ({"lora__rank_stabilized": False}, "lora.rank_stabilized=True, now False: use the same"),
    }.values():
        changes = {"lora__rank_stabilized": True} | changes
        started = lora_settings(folder, **({"model__checkpoint": checkpoint} | changes))
        with pytest.raises(SettingsError, match=f"model.checkpoint={checkpoint} .*{message}"):
            plan_run(started, 1)
        resumed = lora_settings(folder, **({"checkpoint__directory": f"{folder}/dropout"} | changes))
        with pytest.raises(SettingsError, match=message):
            resumable_checkpoint(plan_run(resumed, 1))
    fitting = lora_settings(folder, model__checkpoint=checkpoint, lora__rank_stabilized=True)
    assert plan_run(fitting, 1).settings.lora.rank == RANK
