"""Settings of adapters against the layout and the linears of the model."""

import re

import pytest

from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.lora_targets import OF_MLP
from megatron_sstoken.validate.adapters import check_adapters
from megatron_sstoken.validate.findings import Findings
from megatron_sstoken.validate.run import plan_run
from tests.helpers.plans import only_problem
from tests.helpers.workbench import make_model, make_settings


def test_adapters_of_keys_that_tensor_parallel_does_not_divide(folder, tmp_path):
    few = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6}
    make_model(tmp_path / "model", **few)
    settings = make_settings(
        str(tmp_path / "model"),
        str(folder / "data"),
        parallel__tensor=4,
        lora__rank=2,
        lora__targets=["q_proj", "v_proj"],
    )
    assert only_problem(settings, 4) == (
        "parallel.tensor=4 does not divide model.num_key_value_heads × head_dim=6, the rows of adapters on v_proj: "
        "use 1, 2, 3 or 6, or leave them out of lora.targets"
    )


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("mixtral", ["o_proj", "gate_proj", "up_proj", "down_proj"], None),
        (
            "mixtral",
            ["o_proj", "up_proj"],
            "parts gate_proj and up_proj of experts, which PEFT holds in one tensor: name both",
        ),
        ("qwen3_moe", ["down_proj"], "names linears of experts alone, .*: add one of attention, as o_proj"),
        ("glm4_moe", ["down_proj"], None),  # also of shared experts, which the optimizer of all others has
        ("deepseek_v3", ["q_a_proj", "gate_proj", "up_proj"], None),
        ("gpt_oss", ["q_proj", "down_proj"], None),
        (
            "deepseek_v3",
            ["q_proj", "o_proj"],
            "names q_proj, which model.model_type=deepseek_v3 does not have: use some of o_proj, gate_proj, up_proj, "
            "down_proj, q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj$",
        ),
    ],
)
def test_adapters_of_experts(folder, tmp_path, family, targets, message):
    make_model(tmp_path / "model", family)
    settings = make_settings(str(tmp_path / "model"), str(folder / "data"), lora__rank=2, lora__targets=targets)
    if message is None:
        assert plan_run(settings, 1).settings.lora.targets == targets
        settings.model.backend = "transformer_engine"
        found = Findings([])
        check_adapters(settings, read_architecture(str(tmp_path / "model")), found)
        found, message = (
            found.problems[0],
            "grouped products of model.backend=transformer_engine: use model.backend=torch",
        )
    else:
        found = only_problem(settings, 1)
    assert re.search(message, found)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"parallel__tensor": 4},
            "a parallel.tensor that divides model.num_key_value_heads=2, which 4 does not: use 1 or 2",
        ),
        (
            "llama",
            {"lora__dropout": 0.1},
            "lora.dora=true with lora.dropout=0.1 would compute every linear a second time",
        ),
        ("llama", {"lora__targets": ["q_proj", "embed_tokens"]}, "names the embedding: leave out embed_tokens"),
        ("phi3", {}, r"model.model_type=phi3 fuses \(gate_up_proj, qkv_proj\): use lora.dora=false"),
        ("mixtral", {}, "lora.dora=true is not for experts, as in PEFT"),
    ],
)
def test_dora(folder, tmp_path, family, changes, message):
    make_model(tmp_path / "model", family, tie_word_embeddings=False)
    values = {"lora__rank": 2, "lora__dora": True} | changes
    settings = make_settings(str(tmp_path / "model"), str(folder / "data"), **values)
    assert re.search(message, only_problem(settings, settings.parallel.tensor))


def test_all_linear_means_the_linears_that_a_model_has(folder, tmp_path):
    for family, first in (("deepseek_v3", "o_proj"), ("glm4_moe", "q_proj"), ("qwen3_next", "q_proj")):
        make_model(tmp_path / family, family)
        settings = make_settings(str(tmp_path / family), str(folder / "data"), lora__rank=2)
        lora = plan_run(settings, 1).settings.lora
        assert lora.targets[0] == first and {*OF_MLP} < {*lora.targets}
        linears = set(lora.targets) & {"q_proj", "q_a_proj", "k_proj", "kv_b_proj"}
        assert linears == ({"q_a_proj", "kv_b_proj"} if family == "deepseek_v3" else {"q_proj", "k_proj"})
        assert ({"in_proj_qkvz", "in_proj_ba", "out_proj"} <= {*lora.targets}) == (family == "qwen3_next")
    named = [*lora.targets[:7]]  # of which all are Llama's: they mean what they say
    settings = make_settings(str(tmp_path / family), str(folder / "data"), lora__rank=2, lora__targets=named)
    assert plan_run(settings, 1).settings.lora.targets == named


@pytest.fixture(scope="module")
def delta_nets(tmp_path_factory):
    """The architecture of the miniature with delta nets in its layers 1 and 2."""
    return read_architecture(make_model(tmp_path_factory.mktemp("delta nets"), "qwen3_5_text"))


def test_adapters_of_attention_or_of_delta_nets_alone(delta_nets):
    def findings(targets, **parallel):
        found = Findings([])
        check_adapters(make_settings("", "", lora__rank=2, lora__targets=targets, **parallel), delta_nets, found)
        return found

    assert findings(["q_proj", "o_proj"], parallel__pipeline=2).problems == []
    (note,) = findings(["q_proj"]).notes
    assert note.endswith(
        "which model.model_type=qwen3_5_text has in 2 of 4 layers in place of attention: all-linear names them, too"
    )
    assert findings(["q_proj", "out_proj"], parallel__pipeline=4).notes == []
    (problem,) = findings(["in_proj_z", "out_proj"], parallel__pipeline=4).problems
    assert "leaves nothing to train in the pipeline's layers 0 to 0, 3 to 3: add gate_proj" in problem
    (problem,) = findings(["in_proj_z", "embed_tokens"], parallel__pipeline=4).problems
    assert "nothing to train in the pipeline's layers 3 to 3" in problem
    (problem,) = findings(["in_proj_ba"]).problems
    assert "names in_proj_ba, which model.model_type=qwen3_5_text does not have: use some of q_proj" in problem
    assert findings(["q_proj", "up_proj"], parallel__pipeline=4).problems == []
    (problem,) = findings(["q_proj"], parallel__pipeline=4).problems
    assert "leaves nothing to train in the pipeline's layers 1 to 1, 2 to 2: add gate_proj" in problem
    virtual = findings(["q_proj"], parallel__pipeline=2, parallel__virtual_pipeline=2).problems
    assert virtual == [problem]
