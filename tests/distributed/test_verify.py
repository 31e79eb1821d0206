"""`verify` passes where conversion is right, on every layout, and names the layer where it is not."""

import contextlib
import io
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sstoken.commands.convert_checkpoint import main
from megatron_sstoken.conversion import verify as verify_module
from megatron_sstoken.conversion.hf import from_hf, to_hf
from megatron_sstoken.model import delta_net, delta_rule, latents, weights
from megatron_sstoken.model.families import deepseek_v3, reading, registry, sigmoid_router
from megatron_sstoken.model.gated_attention import GatedSelfAttention
from megatron_sstoken.parallel import reset_layout
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.served import echo_of, model_in_bf16, serving
from tests.helpers.toy import make_tokenizer
from tests.helpers.workbench import EVERYWHERE, FAMILIES, MIXTURES, PARTICULAR, make_model

LAYOUTS = {
    "single": (1, [], []),
    "tp2": (2, ["--tensor=2"], []),
    "pp2": (2, ["--pipeline=2"], ["--expert=1"]),
    "tp2-pp2": (4, ["--tensor=2", "--pipeline=2"], ["--expert=2"]),
}
"""Name → processes, options, and what is added for a mixture of experts."""
CONVERTED = ("phi3", "deepseek_v3", "gpt_oss", "qwen3_5_text", "qwen3_next")
"""Fused tensors; latents, a bias that stays in fp32, layers that are not alike or left out; tensors of all experts, sinks;
delta nets, their linears by kind and by head."""
LEFT_OUT = {"deepseek_v3": "model.layers.4.eh_proj.weight", "qwen3_next": "mtp.fc.weight"}
"""Tensors of layers that predict further tokens."""
ORIGINAL = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
VARIANTS = {
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}),
    "longrope": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 8.0,
                "short_factor": [1.0 + 0.2 * number for number in range(8)],
                "long_factor": [4.0] * 8,
                **ORIGINAL,
            }
        },
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "latents-of-keys": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1},
    ),
    "groups": ("glm4_moe", {"n_group": 2}),
    "attention-bias": ("qwen3_moe", {"attention_bias": True}),
    # Tensor parallel cuts through the one group of queries and gates; text has one position, whatever the sections.
    "gates-of-one-group": (
        "qwen3_5_text",
        {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
}
"""Name → family, and what its config says more."""
MODELS = {family: (family, {}) for family in FAMILIES} | VARIANTS


def run_program(*arguments):
    """The program in this process: exit code and what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(list(arguments))
    reset_layout()
    return code, output.getvalue()


def verify_all(rank, folder, names, options, for_mixtures):
    """Models on this layout."""
    return {
        name: run_program(
            "verify", f"--hf={folder}/{name}", *options, *(for_mixtures if MODELS[name][0] in MIXTURES else [])
        )
        for name in names
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify")
    for number, (name, (family, changes)) in enumerate(MODELS.items()):
        make_model(path / name, family, seed=number, vocab_size=384, **changes)
    make_tokenizer(path / "llama", vocab_size=384)
    return path


@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_passes(folder, layout):
    further = {"single": FAMILIES + tuple(VARIANTS), "tp2-pp2": PARTICULAR + tuple(VARIANTS)}.get(layout, ())
    check_all(folder, layout, tuple(dict.fromkeys(EVERYWHERE + further)))


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2-pp2"])
def test_the_other_families_pass_elsewhere(folder, layout):
    check_all(folder, layout, tuple(name for name in FAMILIES if name not in EVERYWHERE))


def check_all(folder, layout, names):
    num_ranks, options, for_mixtures = LAYOUTS[layout]
    results = run_distributed(verify_all, num_ranks, str(folder), names, options, for_mixtures, timeout=180)
    for family, (code, printed) in results[0].items():
        assert code == 0 and printed.endswith("verified\n"), (family, printed)
        (same, number) = re.search(r"tensors +(\d+) of (\d+) bit-identical", printed).groups()
        assert same == number and int(number) > 20
        if family != "gemma3_text":  # for which transformers makes a tokenizer out of nothing
            assert ("real text" in printed) is (family == "llama"), "only its folder has a tokenizer"
        multiples = [float(value) for value in re.findall(r"differences at most (\S+) times", printed)]
        assert multiples and max(multiples) < 2, printed  # the limit is 4
    assert all(code == 0 for result in results for code, _ in result.values()), "on all ranks"


def write_both_ways(rank, folder):
    """Folders of families whose conversion has something of its own, in bf16, to megatron and back."""
    for family in CONVERTED:
        make_model(f"{folder}/{family}-bf16", family, vocab_size=384)
        tensors = load_file(f"{folder}/{family}-bf16/model.safetensors")
        tensors = {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in tensors.items()}
        further = {LEFT_OUT[family]: torch.ones(2, 2, dtype=torch.bfloat16)} if family in LEFT_OUT else {}
        save_file(tensors | further, f"{folder}/{family}-bf16/model.safetensors", metadata={"format": "pt"})
        from_hf(f"{folder}/{family}-bf16", f"{folder}/{family}-megatron")
        reset_layout()
        to_hf(f"{folder}/{family}-megatron", f"{folder}/{family}-back")
        reset_layout()
        code, printed = run_program(
            "verify", f"--hf={folder}/{family}-bf16", f"--checkpoint={folder}/{family}-megatron"
        )
        assert code == 0, printed
        # A layer that predicts further tokens is left out, as transformers leaves it out.
        assert_same(load_file(f"{folder}/{family}-back/model.safetensors"), tensors)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.timeout(200)
def test_conversion_both_ways_gives_the_bits_back(tmp_path):
    run_distributed(write_both_ways, 1, str(tmp_path), timeout=180)


def verify_llama(rank, folder, *options):
    return run_program("verify", f"--hf={folder}/llama", *options)


def test_stages_may_be_uneven(folder):
    """Four layers on three stages."""
    results = run_distributed(verify_llama, 3, str(folder), "--pipeline=3", timeout=100)
    assert all(code == 0 for code, _ in results) and results[0][1].endswith("verified\n"), results


LAYER = 2
ATTENTION, MLP = f"model.layers.{LAYER}.self_attn.", f"model.layers.{LAYER}.mlp."


def transpose_output(tensors):
    tensors[ATTENTION + "o_proj.weight"] = tensors[ATTENTION + "o_proj.weight"].T.contiguous()


def swap_gate_and_up(tensors):
    gate, up = MLP + "gate_proj.weight", MLP + "up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def zero_bias(tensors):
    tensors[ATTENTION + "v_proj.bias"] = torch.zeros_like(tensors[ATTENTION + "v_proj.bias"])


def roll_heads(tensors):
    """The two query heads of each of the two groups change places."""
    heads = tensors[ATTENTION + "q_proj.weight"].unflatten(0, (2, 2, 8))
    tensors[ATTENTION + "q_proj.weight"] = heads.roll(1, dims=1).flatten(0, 2).contiguous()


MUTATIONS = {
    "transpose a square matrix": ("qwen2", transpose_output, "o_proj.weight"),
    "swap gate and up": ("qwen2", swap_gate_and_up, "gate_proj.weight"),
    "drop a bias": ("qwen2", zero_bias, "v_proj.bias"),
    "roll q heads within a group": ("qwen2", roll_heads, "q_proj.weight"),
}


def verify_mutants(rank, folder):
    """Convert a changed folder, and prove the checkpoint against the unchanged one."""
    results = {}
    for number, (family, mutate, _) in enumerate(MUTATIONS.values()):
        make_mutant(folder, family, f"mutant{number}", mutate)
        from_hf(f"{folder}/mutant{number}", f"{folder}/mutant{number}-megatron")
        reset_layout()
        results[list(MUTATIONS)[number]] = run_program(
            "verify", f"--hf={folder}/{family}", f"--checkpoint={folder}/mutant{number}-megatron"
        )
    from_hf(f"{folder}/qwen2", f"{folder}/right-megatron")
    reset_layout()
    results["nothing"] = run_program("verify", f"--hf={folder}/qwen2", f"--checkpoint={folder}/right-megatron")
    return results


def make_mutant(folder, family, name, mutate):
    make_model(f"{folder}/{name}", family, vocab_size=384)
    tensors = load_file(f"{folder}/{family}/model.safetensors")
    mutate(tensors)
    save_file(tensors, f"{folder}/{name}/model.safetensors", metadata={"format": "pt"})


@pytest.mark.timeout(200)
def test_wrong_weights_are_caught_and_the_layer_is_named(folder):
    results = run_distributed(verify_mutants, 1, str(folder), timeout=180)[0]
    assert results.pop("nothing")[0] == 0
    for name, (code, printed) in results.items():
        assert code == 1 and "NOT THE SAME" in printed, name
        assert f"differs: model.layers.{LAYER}." in printed and MUTATIONS[name][2] in printed, (name, printed)
        assert f"the first to differ: layer {LAYER}" in printed, (name, printed)


OF_LATENTS = {
    "the model's epsilon in norms of latents": (latents, "_EPSILON", 1e-3),
    "scores without YaRN's growth": (deepseek_v3, "_growth", lambda config: 1.0),
    "halves turned, not pairs": (latents, "halves_of_pairs", lambda turned: turned),
    "experts of all groups": (sigmoid_router, "_groups", lambda config: {}),
}
"""Mistakes with latents → where, what, and what takes its place."""
OF_DELTA_NETS = {
    "no convolution": (delta_net, "short_convolution", lambda inputs, weight, lengths: inputs),
    "keys as long as they are": (delta_rule, "_of_length_one", lambda vectors: vectors),
    "no gates": (GatedSelfAttention, "_apply_output_gate", lambda attention, output, gate: output),
}
"""The same with delta nets, and with gates of attention."""


def verify_with_wrong_code(rank, folder):
    """Mistakes of the conversion itself that undo themselves on the way back, so that the tensors come out right."""
    results = {}

    def with_changed(owner, name, replacement, title, family="llama"):
        original = getattr(owner, name)
        setattr(owner, name, replacement(original))
        results[title] = run_program("verify", f"--hf={folder}/{family}")
        setattr(owner, name, original)

    def transposed(original):
        def read(tensors, rule, layer, architecture, *place):
            shard = original(tensors, rule, layer, architecture, *place)
            return shard.T if layer == LAYER and rule.megatron.endswith("linear_proj.weight") else shard

        return read

    def transposed_back(original):
        def convert(rule, layer, parameter, architecture):
            wrong = layer == LAYER and rule.megatron.endswith("linear_proj.weight")
            return original(rule, layer, parameter.T if wrong else parameter, architecture)

        return convert

    verify_module.to_hugging_face, kept = transposed_back(verify_module.to_hugging_face), verify_module.to_hugging_face
    with_changed(weights, "read_shard", transposed, "transposed both ways")
    verify_module.to_hugging_face = kept

    def other_base(original):
        return lambda path, config: (original(path, config)[0] * 2, original(path, config)[1])

    with_changed(reading, "read_rope", other_base, "wrong rope base")

    def no_window(original):
        return lambda *arguments: (None, ())

    with_changed(reading, "_sliding_window", no_window, "no window", family="mistral")

    def other_epsilon(original):
        return lambda path: replace(original(path), norm_epsilon=1.1 * original(path).norm_epsilon)

    with_changed(verify_module, "read_architecture", other_epsilon, "epsilon of the norms a tenth larger")

    def rope_everywhere(original):
        return original | {"smollm3": replace(original["smollm3"], transformer_options=registry.nothing_added)}

    with_changed(registry, "_FAMILIES", rope_everywhere, "rope everywhere", family="smollm3")

    def without_bias(original):
        return original | {"qwen2": replace(original["qwen2"], qkv_bias=False)}

    with_changed(registry, "_FAMILIES", without_bias, "no biases", family="qwen2")

    for title, (owner, name, replacement) in OF_LATENTS.items():
        with_changed(owner, name, lambda original, new=replacement: new, title, family="deepseek_v3")
    for title, (owner, name, replacement) in OF_DELTA_NETS.items():
        with_changed(owner, name, lambda original, new=replacement: new, title, family="qwen3_5_text")
    return results


@pytest.mark.timeout(200)
def test_wrong_conversions_that_round_trip_are_caught_by_the_logits(folder):
    results = run_distributed(verify_with_wrong_code, 1, str(folder), timeout=180)[0]
    expected = {"transposed both ways": f"layer {LAYER}", "wrong rope base": "layer 0", "no window": "layer 0"}
    expected["rope everywhere"] = "layer 1"  # the first without it
    expected["epsilon of the norms a tenth larger"] = "layer 0"
    expected |= dict.fromkeys(OF_DELTA_NETS, "layer 1") | {"no gates": "layer 0"}
    expected |= dict.fromkeys(OF_LATENTS, "layer 0") | {"experts of all groups": "layer 1"}  # the first with experts
    for name, layer in expected.items():
        code, printed = results[name]
        assert code == 1 and f"the first to differ: {layer}\n" in printed, (name, printed)
        (same, number) = re.search(r"tensors +(\d+) of (\d+) bit-identical", printed).groups()
        assert same == number, "the round trip alone does not notice"
    code, printed = results["no biases"]
    assert code == 1 and "model.layers.0.self_attn.k_proj.bias is lost" in printed, printed


def verify_served(rank, folder, url):
    """Against servers of the same model, and of one with an error that bf16 does not hide."""
    return {
        model: run_program("verify", f"--hf={folder}/llama", f"--served={url}", f"--served_model={model}", "--tensor=2")
        for model in ("right", "wrong", "short")
    }


@pytest.mark.timeout(120)
def test_a_server_may_be_the_reference(folder):
    right, wrong = (model_in_bf16(folder / "llama") for _ in range(2))
    with torch.no_grad():
        weight = wrong.model.layers[1].self_attn.q_proj.weight
        weight.copy_(weight.roll(16, dims=0))  # heads

    def refuse(_):
        raise ValueError("too long")

    with serving({"right": echo_of(right), "wrong": echo_of(wrong), "short": refuse}) as url:
        results = run_distributed(verify_served, 2, str(folder), url, timeout=100)
    for result in results:
        assert {name: code for name, (code, _) in result.items()} == {"right": 0, "wrong": 1, "short": 2}
    printed = {name: text for name, (_, text) in results[0].items()}
    assert float(re.search(r"differences (\S+) times that noise", printed["right"])[1]) < 2, "the limit is 4"
    assert "NOT THE SAME" in printed["wrong"] and "39 of 39 bit-identical" in printed["wrong"]


def test_mistakes_are_told_in_a_line(folder, tmp_path, capsys):
    assert main(["verify", f"--hf={tmp_path}"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["verify", f"--hf={folder}/llama", "--tensor=2"]) == 2
    assert "1 processes cannot be split into parallel.tensor=2" in capsys.readouterr().err
    assert main(["verify", f"--hf={folder}/llama", "--tensor=0"]) == 2
    assert "--tensor=0 is too small" in capsys.readouterr().err
