"""Hugging Face tensors → slices of megatron's parameters → Hugging Face tensors.

The layouts of megatron's fused parameters are undone here by explicit loops over query groups and heads.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sstoken.model.families import Architecture, WeightRule, read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import (
    load_hugging_face,
    read_shard,
    rules_of_chunk,
    to_hugging_face,
)
from tests.helpers.workbench import load_model, make_model

FAMILIES = ("llama", "qwen2")
PADDED = 128
LAYER = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both families: 4 layers, 4 heads of 8 in 2 groups, feed-forward 48, vocabulary 99."""
    folder = tmp_path_factory.mktemp("weights")
    for family in FAMILIES:
        make_model(folder / family, family)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def case(folder, request) -> tuple[Architecture, HuggingFaceWeights, dict[str, torch.Tensor]]:
    """Architecture, the lazy reader under test, and all tensors as the library reads them."""
    path = folder / request.param
    return read_architecture(str(path)), HuggingFaceWeights(str(path)), load_file(path / "model.safetensors")


def rule_of(a: Architecture, ending: str) -> WeightRule:
    (rule,) = [rule for rule in a.weight_rules() if rule.megatron.endswith(ending)]
    return rule


def whole_shape(a: Architecture, megatron_name: str) -> list[int]:
    """Shape of the unsplit megatron parameter, written out from its definition."""
    fused = (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim
    return {
        "input_layernorm.weight": [a.hidden_size],
        "linear_qkv.weight": [fused, a.hidden_size],
        "linear_qkv.bias": [fused],
        "linear_proj.weight": [a.hidden_size, a.num_attention_heads * a.head_dim],
        "pre_mlp_layernorm.weight": [a.hidden_size],
        "linear_fc1.weight": [2 * a.ffn_hidden_size, a.hidden_size],
        "linear_fc2.weight": [a.hidden_size, a.ffn_hidden_size],
        "word_embeddings.weight": [PADDED, a.hidden_size],
        "final_layernorm.weight": [a.hidden_size],
        "output_layer.weight": [PADDED, a.hidden_size],
    }[".".join(megatron_name.split(".")[-2:])]


def shard_shape(a: Architecture, megatron_name: str, tensor_size: int) -> torch.Size:
    """Row-parallel linears are split by columns, norms not at all, everything else by rows."""
    shape = whole_shape(a, megatron_name)
    if "layernorm" not in megatron_name:
        dim = 1 if "linear_proj" in megatron_name or "linear_fc2" in megatron_name else 0
        assert shape[dim] % tensor_size == 0
        shape[dim] //= tensor_size
    return torch.Size(shape)


def shards_of(case, rule: WeightRule, tensor_size: int) -> list[torch.Tensor]:
    a, tensors, _ = case
    shape = shard_shape(a, rule.megatron, tensor_size)
    shards = [read_shard(tensors, rule, LAYER, a, shape, rank, tensor_size) for rank in range(tensor_size)]
    assert all(shard.shape == shape for shard in shards)
    return shards


def undo_qkv(fused: torch.Tensor, a: Architecture) -> list[torch.Tensor]:
    """The q, k and v rows of a matrix that holds, group after group, the query heads, one key and one value head."""
    q, k, v = [], [], []
    row = 0
    for _group in range(a.num_query_groups):
        for _head in range(a.num_attention_heads // a.num_query_groups):
            q.append(fused[row : row + a.head_dim])
            row += a.head_dim
        for part in (k, v):
            part.append(fused[row : row + a.head_dim])
            row += a.head_dim
    assert row == len(fused)
    return [torch.cat(part) for part in (q, k, v)]


def undo(rule: WeightRule, shards: list[torch.Tensor], a: Architecture) -> list[torch.Tensor]:
    """The Hugging Face tensors that these ranks' shards hold together."""
    kind = ".".join(rule.megatron.split(".")[-2:])
    if "layernorm" in kind:
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[:1]
    if kind in ("linear_proj.weight", "linear_fc2.weight"):
        return [torch.cat(shards, dim=1)]
    if kind == "linear_fc1.weight":  # a rank computes silu(gate)·up on its own rows
        half = len(shards[0]) // 2
        return [torch.cat([shard[:half] for shard in shards]), torch.cat([shard[half:] for shard in shards])]
    whole = torch.cat(shards)
    if kind.startswith("linear_qkv"):
        return undo_qkv(whole, a)
    assert (whole[a.vocabulary_size :] == 0).all()
    return [whole[: a.vocabulary_size]]


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_all_shards_hold_the_tensors(case, tensor_size):
    a, _, expected = case
    for rule in a.weight_rules():
        parts = undo(rule, shards_of(case, rule, tensor_size), a)
        for name, part in zip(rule.hugging_face, parts, strict=True):
            assert torch.equal(part, expected[name.format(layer=LAYER)]), (rule.megatron, name)


def test_a_cut_through_a_query_group(case):
    """With 4 ranks and 2 groups each rank holds half of a group: rank 1 its key and value, and no query."""
    a, _, expected = case
    shards = shards_of(case, rule_of(a, "linear_qkv.weight"), 4)
    group_key = expected[f"model.layers.{LAYER}.self_attn.k_proj.weight"][: a.head_dim]
    group_value = expected[f"model.layers.{LAYER}.self_attn.v_proj.weight"][: a.head_dim]
    assert torch.equal(shards[1], torch.cat([group_key, group_value]))


def test_ranks_beyond_the_vocabulary_hold_padding_only(case):
    a, tensors, expected = case
    rule = rule_of(a, "word_embeddings.weight")
    shape = torch.Size([64, a.hidden_size])
    shards = [read_shard(tensors, rule, 0, a, shape, rank, 4) for rank in range(4)]
    embedding = expected["model.embed_tokens.weight"]
    assert torch.equal(shards[0], embedding[:64]) and torch.equal(shards[1][:35], embedding[64:])
    assert (shards[1][35:] == 0).all() and (shards[2] == 0).all() and (shards[3] == 0).all()


class CountingWeights(HuggingFaceWeights):
    """Counts the bytes of what is read."""

    num_bytes = 0

    def slice(self, name):
        return _CountingSlice(self, super().slice(name))


class _CountingSlice:
    def __init__(self, counter, inner):
        self._counter, self._inner = counter, inner
        self.get_shape = inner.get_shape

    def __getitem__(self, index):
        part = self._inner[index]
        self._counter.num_bytes += part.nbytes
        return part


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_a_rank_reads_its_slices_and_no_more(case, tensor_size):
    a, tensors, _ = case
    for rule in a.weight_rules():
        shape = shard_shape(a, rule.megatron, tensor_size)
        for rank in range(tensor_size):
            counting = CountingWeights(tensors.path)
            shard = read_shard(counting, rule, LAYER, a, shape, rank, tensor_size)
            padding = max(0, (rank + 1) * shape[0] - a.vocabulary_size) if shape[0] * tensor_size == PADDED else 0
            assert counting.num_bytes == shard.nbytes - padding * shard[0].nbytes, rule.megatron


def test_to_hugging_face_inverts_read_shard(case):
    a, _, expected = case
    found = {}
    for rule in a.weight_rules():
        (whole,) = shards_of(case, rule, 1)
        found |= dict(to_hugging_face(rule, LAYER, whole, a))
    wanted = {name for name in expected if "layers" not in name or f"layers.{LAYER}." in name}
    assert found.keys() == wanted
    assert all(torch.equal(found[name], expected[name]) and found[name].is_contiguous() for name in found)


class Chunk(torch.nn.Module):
    """Empty parameters under megatron's names, as a pipeline stage with some of the layers holds them."""

    def __init__(self, a: Architecture, layers: range, names: list[str], tensor_size: int = 1):
        super().__init__()
        local = [f"decoder.layers.{number}." for number in range(len(layers))]
        for rule in a.weight_rules():
            inner = rule.megatron.removeprefix("decoder.layers.{layer}.")
            for prefix in local if inner != rule.megatron else [""] if rule.megatron in names else []:
                self._place(prefix + inner, shard_shape(a, rule.megatron, tensor_size))
        if "output_layer.weight" in names and a.tied_embeddings:
            self._place("output_layer.weight", shard_shape(a, "output_layer.weight", tensor_size))
        for number, layer in enumerate(layers):
            self.decoder.layers[number].layer_number = layer + 1

    def _place(self, name: str, shape: torch.Size) -> None:
        *path, last = name.split(".")
        module = self
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, torch.nn.ModuleList() if step == "layers" else torch.nn.Module())
            module = getattr(module, step)
        module.register_parameter(last, torch.nn.Parameter(torch.full(shape, torch.nan)))


def test_a_later_stage_reads_its_own_layers(case):
    a, tensors, expected = case
    chunk = Chunk(a, range(2, 4), ["decoder.final_layernorm.weight", "output_layer.weight"])
    load_hugging_face(chunk, tensors, a, 0, 1)
    found = dict(chunk.named_parameters())
    assert found.keys() <= rules_of_chunk(chunk, a).keys()
    for local, layer in ((0, 2), (1, 3)):
        name = f"decoder.layers.{local}.mlp.linear_fc2.weight"
        assert torch.equal(found[name], expected[f"model.layers.{layer}.mlp.down_proj.weight"])
    assert torch.equal(found["decoder.final_layernorm.weight"], expected["model.norm.weight"])
    # a tied head on another stage than the embedding is a copy of it
    head = expected["model.embed_tokens.weight" if a.tied_embeddings else "lm_head.weight"]
    assert torch.equal(found["output_layer.weight"][:99], head)
    assert not any(parameter.isnan().any() for parameter in found.values())


def test_each_rank_loads_its_slices(case):
    a, tensors, _ = case
    for rank in range(2):
        chunk = Chunk(a, range(4), ["embedding.word_embeddings.weight"], tensor_size=2)
        load_hugging_face(chunk, tensors, a, rank, 2)
        for name, parameter in chunk.named_parameters():
            rule, layer = rules_of_chunk(chunk, a)[name]
            assert torch.equal(parameter, read_shard(tensors, rule, layer, a, parameter.shape, rank, 2)), name


def test_bf16_files_fill_fp32_parameters(folder, tmp_path):
    load_model(folder / "qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16}
    a = read_architecture(str(tmp_path))
    chunk = Chunk(a, range(4), ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"])
    load_hugging_face(chunk, HuggingFaceWeights(str(tmp_path)), a, 0, 1)
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.float32}
    assert torch.equal(chunk.embedding.word_embeddings.weight[:99], expected["model.embed_tokens.weight"].float())
    gate, up = chunk.decoder.layers[1].mlp.linear_fc1.weight.chunk(2)
    assert torch.equal(gate, expected["model.layers.1.mlp.gate_proj.weight"].float())
    assert torch.equal(up, expected["model.layers.1.mlp.up_proj.weight"].float())


def test_sharded_files(folder, tmp_path):
    load_model(folder / "llama").save_pretrained(tmp_path, max_shard_size="60KB")
    whole, sharded = HuggingFaceWeights(str(folder / "llama")), HuggingFaceWeights(str(tmp_path))
    assert len(sharded.files()) > 1 and whole.files() == [str(folder / "llama" / "model.safetensors")]
    assert sharded.files() == sorted(map(str, tmp_path.glob("*.safetensors")))
    assert sharded.names() == whole.names() == sorted(load_file(folder / "llama" / "model.safetensors"))
    assert all(torch.equal(sharded.slice(name)[:], whole.slice(name)[:]) for name in whole.names())


def changed(folder: Path, target: Path, change) -> HuggingFaceWeights:
    """The Llama of `folder` with `change` applied to its tensors."""
    shutil.copytree(folder / "llama", target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return HuggingFaceWeights(str(target))


def test_a_missing_tensor_is_named(folder, tmp_path):
    name = f"model.layers.{LAYER}.self_attn.k_proj.weight"
    tensors = changed(folder, tmp_path / "model", lambda tensors: tensors.pop(name))
    a = read_architecture(tensors.path)
    with pytest.raises(ValueError, match=f"{tensors.path}: the tensor {name} is missing"):
        load_hugging_face(Chunk(a, range(4), []), tensors, a, 0, 1)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.2.self_attn.k_proj.weight", [32, 32], [16, 32]),
        ("model.layers.2.self_attn.o_proj.weight", [32, 16], [32, 32]),
        ("model.layers.2.mlp.up_proj.weight", [32, 48], [48, 32]),
        ("model.layers.2.mlp.down_proj.weight", [48, 32], [32, 48]),
        ("model.layers.2.input_layernorm.weight", [64], [32]),
        ("model.embed_tokens.weight", [128, 32], [99, 32]),
        ("lm_head.weight", [98, 32], [99, 32]),
        ("model.norm.weight", [16], [32]),
    ],
)
def test_a_wrong_shape_is_named(folder, tmp_path, name, shape, expected):
    tensors = changed(folder, tmp_path / "model", lambda tensors: tensors.update({name: torch.zeros(shape)}))
    a = read_architecture(tensors.path)
    (rule,) = [rule for rule in a.weight_rules() if name in [p.format(layer=2) for p in rule.hugging_face]]
    with pytest.raises(ValueError) as error:
        read_shard(tensors, rule, LAYER, a, shard_shape(a, rule.megatron, 1), 0, 1)
    assert str(error.value) == f"{tensors.path}: {name} has shape {shape}, config.json says {expected}"


def test_a_wrong_bias_is_named(folder, tmp_path):
    shutil.copytree(folder / "qwen2", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.bias"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    a, weights = read_architecture(str(tmp_path / "model")), HuggingFaceWeights(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"v_proj.bias has shape \[8\], config.json says \[16\]"):
        read_shard(weights, rule_of(a, "linear_qkv.bias"), LAYER, a, torch.Size([64]), 0, 1)


def test_missing_files(folder, tmp_path):
    with pytest.raises(ValueError, match="has neither model.safetensors nor model.safetensors.index.json"):
        HuggingFaceWeights(str(tmp_path))
    load_model(folder / "llama").save_pretrained(tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(
        ValueError, match=f"{tmp_path}: {gone.name}, named by model.safetensors.index.json, is missing: download the"
    ):
        HuggingFaceWeights(str(tmp_path))
    for outside in ("../outside.safetensors", str(tmp_path / "single" / "outside.safetensors")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": outside}}))
        with pytest.raises(ValueError, match=f"the index names {outside}, which is not in that folder"):
            HuggingFaceWeights(str(tmp_path))
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ValueError, match="single/model.safetensors is not a readable safetensors file"):
        HuggingFaceWeights(str(tmp_path / "single"))
