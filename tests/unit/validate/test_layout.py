"""Settings against the number of processes and the shape of the model."""

import pytest

from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.validate.findings import Findings
from megatron_sstoken.validate.layout import check_fp8, check_split, check_windows
from megatron_sstoken.validate.run import plan_run
from tests.helpers.plans import only_problem, problems_of
from tests.helpers.workbench import make_model, make_settings


@pytest.mark.parametrize(
    ("world_size", "parallel", "data_size", "pack_multiple", "sample_multiple"),
    [
        (4, {"parallel__tensor": 2}, 2, 64, 1),
        (
            4,
            {"parallel__tensor": 4, "parallel__sequence": True},
            1,
            64,
            1,
        ),  # the cut goes through query groups
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}, 1, 64, 1),
        (8, {"parallel__tensor": 2, "parallel__pipeline": 2}, 2, 64, 1),
        (2, {"parallel__pipeline": 2, "parallel__first_stage_layers": 1}, 1, 64, 1),
        (6, {"parallel__context": 3}, 2, 192, 6),
        (8, {"parallel__context": 2, "parallel__tensor": 2, "parallel__sequence": True}, 2, 64, 4),
    ],
)
def test_layouts_that_fit(settings, world_size, parallel, data_size, pack_multiple, sample_multiple):
    shape = plan_run(settings(**parallel), world_size).shape
    assert (shape.data_size, shape.pack_multiple, shape.sample_multiple) == (
        data_size,
        pack_multiple,
        sample_multiple,
    )


# name → changes, number of processes, the whole message ({model} and {data} are folders)
LAYOUT_PROBLEMS = {
    "processes": (
        {"parallel__tensor": 2, "parallel__pipeline": 2},
        6,
        "6 processes cannot be split into parallel.tensor=2 × parallel.pipeline=2 × parallel.context=1 = 4: "
        "start a multiple of 4 processes, or use smaller sizes",
    ),
    "global batch": (
        {"training__global_batch_size": 10, "training__micro_batch_size": 2},
        4,
        "training.global_batch_size=10 is not a multiple of training.micro_batch_size=2 × data parallel size 4 = 8: "
        "use 8 or 16",
    ),
    "small global batch": (
        {"training__global_batch_size": 3},
        4,
        "training.global_batch_size=3 is not a multiple of training.micro_batch_size=1 × data parallel size 4 = 4: "
        "use 4",
    ),
    "interleaved batch": (
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "training__global_batch_size": 7},
        2,
        "training.global_batch_size=7 gives 7 micro-batches; the interleaved schedule needs a multiple of "
        "parallel.pipeline=2: use a multiple of 2",
    ),
    "layers": (
        {"parallel__pipeline": 3},
        3,
        "parallel.pipeline=3 × parallel.virtual_pipeline=1 = 3 does not divide model.num_hidden_layers=4: "
        "use a product of 1, 2 or 4, or parallel.first_stage_layers=1 and parallel.last_stage_layers=1",
    ),
    "layers and chunks": (
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3},
        2,
        "parallel.pipeline=2 × parallel.virtual_pipeline=3 = 6 does not divide model.num_hidden_layers=4: "
        "use a product of 1, 2 or 4",
    ),
    "first stage": (
        {"parallel__pipeline": 4, "parallel__first_stage_layers": 2},
        4,
        "parallel.first_stage_layers=2 leave 2 of model.num_hidden_layers=4 for 3 other stages to share evenly: "
        "use other numbers",
    ),
    "first and last stage": (
        {"parallel__pipeline": 2, "parallel__first_stage_layers": 2, "parallel__last_stage_layers": 1},
        2,
        "parallel.first_stage_layers=2 and parallel.last_stage_layers=1 leave 1 of model.num_hidden_layers=4 for no other "
        "stage to share evenly: use other numbers",
    ),
    "chunks of stages": (
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__first_stage_layers": 1},
        2,
        "parallel.first_stage_layers=1 leave 3 of model.num_hidden_layers=4 for one other stage to share "
        "evenly, and every stage is split into parallel.virtual_pipeline=2 equal chunks: use other numbers",
    ),
    "offloaded layers": (
        {"training__offload_layers": 4, "training__precision": "bf16"},
        1,
        "training.offload_layers=4 is not below model.num_hidden_layers=4, and the last layer's activations are needed at "
        "once: use 3 or less",
    ),
    "length": (
        {"data__sequence_length": 513},
        1,
        "data.sequence_length=513 is longer than the model's max_position_embeddings=512: use 512 or less",
    ),
    "no such layer": (
        {"selection__layer": 4},
        1,
        "selection.layer=4 does not exist in a model of 4 layers: use -4 to 3",
    ),
    "no such layer from the end": (
        {"selection__layer": -5},
        1,
        "selection.layer=-5 does not exist in a model of 4 layers: use -4 to 3",
    ),
    "no such layer in a list": (
        {"selection__layer": [0, 7]},
        1,
        "selection.layer=7 does not exist in a model of 4 layers: use -4 to 3",
    ),
    "a layer twice": (
        {"selection__layer": [3, -1]},
        1,
        "selection.layer=[3, -1] names a layer twice in a model of 4 layers: use each once",
    ),
    "no data": (
        {"data__train": "/nowhere/data"},
        1,
        "data.train: prepared data: /nowhere/data does not exist: make it with tools/prepare_data.py",
    ),
    "no validation data": (
        {"data__validation": "/nowhere/data"},
        1,
        "data.validation: prepared data: /nowhere/data does not exist: make it with tools/prepare_data.py",
    ),
    "no model": (
        {"model__hf_path": "/nowhere/model"},
        1,
        "model.hf_path: /nowhere/model does not exist: name the folder of a Hugging Face checkpoint",
    ),
    "no checkpoint": (
        {"model__checkpoint": "/nowhere/step"},
        1,
        "model.checkpoint: /nowhere/step holds no complete checkpoint (a folder step_<number> with sstoken.json): "
        "name another folder",
    ),
    "no history model": (
        {"history__hf_path": "/nowhere/old"},
        1,
        "history.hf_path: /nowhere/old does not exist: name the folder of a Hugging Face checkpoint",
    ),
}


@pytest.mark.parametrize("name", LAYOUT_PROBLEMS)
def test_what_does_not_fit(settings, name):
    changes, world_size, message = LAYOUT_PROBLEMS[name]
    assert message in problems_of(settings(**changes), world_size)


@pytest.mark.parametrize(
    ("shape", "tensor", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 36},
            4,
            "parallel.tensor=4 does not divide model.num_attention_heads=6: use 1, 2, 3 or 6",
        ),
        (
            {"intermediate_size": 50},
            4,
            "parallel.tensor=4 does not divide model.intermediate_size=50: use 1, 2, 5, 10, 25 or 50",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 48},
            6,
            "parallel.tensor=6 neither divides nor is a multiple of model.num_key_value_heads=4: use 1, 2 or 4",
        ),
        (
            {"family": "olmo2"},
            4,
            "parallel.tensor=4 does not divide model.num_key_value_heads=2, over all of which model.model_type=olmo2 "
            "normalises: use 1 or 2",
        ),
    ],
)
def test_tensor_parallel_against_the_model(folder, tmp_path, shape, tensor, message):
    make_model(tmp_path / "model", **shape)
    settings = make_settings(str(tmp_path / "model"), str(folder / "data"), parallel__tensor=tensor)
    assert message in problems_of(settings, tensor)
    settings.parallel.tensor = 2
    assert plan_run(settings, 2).shape.data_size == 1


@pytest.mark.parametrize(
    ("shape", "parallel", "named"),
    [
        ({"num_hidden_layers": 3}, {"parallel__pipeline": 2}, "num_hidden_layers=3"),
        ({"intermediate_size": 49}, {"parallel__tensor": 2}, "intermediate_size=49"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48},
            {"parallel__tensor": 2},
            "num_key_value_heads=3",
        ),
    ],
)
def test_history_model_that_the_layout_does_not_divide(settings, tmp_path, shape, parallel, named):
    history = make_model(tmp_path / "history", **shape)
    assert f"history.{named}: use" in only_problem(settings(history__hf_path=history, **parallel), 2)
    plan_run(settings(history__hf_path=history), 1)


@pytest.fixture(scope="module")
def mixture(folder) -> str:
    """Another `mixture` of 4 experts a layer, same vocabulary."""
    return make_model(folder / "mixture", "mixtral")


@pytest.mark.parametrize(
    ("world_size", "parallel", "message"),
    [
        (
            2,
            {"parallel__expert": 3},
            "parallel.expert=3 does not divide the 2 processes of a pipeline stage: use 1 or 2",
        ),
        (6, {"parallel__expert": 3}, "parallel.expert=3 does not divide model.num_experts=4: use 1, 2 or 4"),
        (
            2,
            {"parallel__tensor": 2},
            "parallel.sequence=false with parallel.tensor=2 would compute the experts of every token 2 times: "
            "use parallel.sequence=true",
        ),
    ],
)
def test_experts_must_be_dealt_out_evenly(settings, mixture, world_size, parallel, message):
    problems = problems_of(settings(model__hf_path=mixture, training__global_batch_size=12, **parallel), world_size)
    assert message in problems


def test_a_stage_of_dense_layers_alone(settings, tmp_path):
    path = make_model(tmp_path / "model", "glm4_moe", first_k_dense_replace=2)
    values = {"model__hf_path": path, "parallel__pipeline": 2, "checkpoint__directory": str(tmp_path / "run")}
    problem = only_problem(settings(**values), 2)
    assert (
        "pipeline=2 leaves stage 0 (from 0) no layer with experts, of which model.model_type=glm4_moe has none in 0, 1"
        in problem
    )
    assert "use other numbers of layers (parallel.first_stage_layers, last_stage_layers), or fewer stages" in problem
    lora = {"lora__rank": 2, "lora__targets": ["o_proj"]}
    for changes in ({"parallel__first_stage_layers": 3}, {"checkpoint__directory": None}, lora):
        assert plan_run(settings(**(values | changes)), 2).world_size == 2


@pytest.mark.parametrize(
    ("shape", "parallel", "stages"),
    [
        ({"mlp_only_layers": [2, 3]}, {"pipeline": 2}, "1"),
        ({"mlp_only_layers": [2, 3]}, {"pipeline": 2, "first_stage_layers": 3}, "1"),
        ({"mlp_only_layers": [2, 3]}, {"pipeline": 2, "first_stage_layers": 1}, None),
        ({"mlp_only_layers": [1, 2]}, {"pipeline": 3, "first_stage_layers": 1, "last_stage_layers": 1}, "1"),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, {"pipeline": 4}, "0 and 2"),
        ({"mlp_only_layers": [2, 3]}, {"pipeline": 2, "virtual_pipeline": 2}, None),
        ({"mlp_only_layers": [1, 3]}, {"pipeline": 2, "virtual_pipeline": 2}, "1"),
    ],
)
def test_dense_layers_alone_in_any_stage(tmp_path, shape, parallel, stages):
    architecture = read_architecture(make_model(tmp_path / "model", "qwen3_next", **shape))
    split = {f"parallel__{name}": value for name, value in parallel.items()}
    found = Findings([])
    check_split("model", architecture, make_settings("", "", checkpoint__directory="run", **split), found)
    assert [problem.partition(" (from 0)")[0] for problem in found.problems] == (
        [] if stages is None else [f"parallel.pipeline={parallel['pipeline']} leaves stage {stages}"]
    )


def test_experts_over_all_the_processes_of_a_stage(settings, mixture):
    split = {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2, "parallel__expert": 4}
    plan = plan_run(settings(model__hf_path=mixture, **split), 8)
    assert (plan.shape.data_size, plan.architecture.num_experts) == (2, 4)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """The architecture of the miniature with latent attention."""
    return read_architecture(make_model(tmp_path_factory.mktemp("latents"), "deepseek_v3"))


def test_a_dense_model_has_no_experts(settings):
    assert only_problem(settings(parallel__expert=2), 2) == (
        "parallel.expert=2 needs a mixture of experts, which model.model_type=llama is not: use 1"
    )


@pytest.fixture(scope="module")
def delta_nets(tmp_path_factory):
    """The architecture of the miniature with delta nets in its layers 1 and 2."""
    return read_architecture(make_model(tmp_path_factory.mktemp("delta nets"), "qwen3_5_text"))


def test_key_heads_of_delta_nets_are_dealt_out(delta_nets):
    found = Findings([])
    check_split("model", delta_nets, make_settings("", "", parallel__tensor=4), found)
    assert found.problems == ["parallel.tensor=4 does not divide model.linear_num_key_heads=2: use 1 or 2"]


def test_fp8_wants_tiles_of_delta_nets(delta_nets):
    found = Findings([])
    settings = make_settings("", "", training__precision="fp8", training__fp8_recipe="mxfp8", parallel__tensor=2)
    check_fp8(settings, delta_nets, found)
    widths = dict(
        problem.split("; model.")[1].split(" with ")[0].split(" leaves a rank ") for problem in found.problems
    )
    # A rank has 1 of 2 key heads of 6 numbers, with 2 value heads of 8, which have gates of 8 and two numbers more.
    assert widths["linear_num_value_heads × linear_value_head_dim"] == "16"
    made = "2 · linear_num_key_heads × linear_key_head_dim + 2 · linear_num_value_heads × (linear_value_head_dim + 1)"
    assert widths[made] == str(2 * 6 + 2 * 2 * (8 + 1))


def test_fp8_wants_tiles_of_latents(latents):
    settings = make_settings("", "", training__precision="fp8", parallel__tensor=2)
    found = Findings([])
    check_fp8(settings, latents, found)
    named = {problem.split("; model.")[1].split(" leaves")[0] for problem in found.problems}
    # Of 4 heads a rank has 2: queries of 12 numbers, keys without RoPE of 8, values of 6; latents are whole.
    assert named == {
        "num_attention_heads × (qk_nope_head_dim + qk_rope_head_dim)",
        "num_attention_heads × (qk_nope_head_dim + v_head_dim)",
        "num_attention_heads × v_head_dim",
        "kv_lora_rank",
        "q_lora_rank",
        "intermediate_size",
    }


@pytest.mark.parametrize(("parallel", "fits"), [((1, 2), True), ((2, 2), False), ((1, 4), False), ((4, 1), True)])
def test_sliding_windows_under_context_parallel_on_transformer_engine(tmp_path, parallel, fits):
    """Its ring refuses windows, and dealing out heads needs enough of them."""
    architecture = read_architecture(make_model(tmp_path / "model", "mistral"))
    settings = make_settings("", "", parallel__tensor=parallel[0], parallel__context=parallel[1])

    def problems(backend):
        found = Findings([])
        check_windows("model", architecture, settings, backend, found)
        return found.problems

    assert problems("torch") == []
    if fits:
        assert problems("transformer_engine") == []
    else:
        (problem,) = problems("transformer_engine")
        assert problem == (
            f"parallel.tensor={parallel[0]} × parallel.context={parallel[1]} = 4 does not divide "
            "model.num_key_value_heads=2, which sliding windows on Transformer Engine need: use a product of 1 or 2, or "
            "model.backend=torch"
        )
