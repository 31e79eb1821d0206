"""Hugging Face → megatron → Hugging Face: the same tensors, and the same logits at every position."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_sstoken.checkpoint.manifest import open_checkpoint
from megatron_sstoken.conversion.hf import from_hf, reshard, to_hf
from megatron_sstoken.parallel import reset_layout
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.plans import write_samples
from tests.helpers.workbench import LAYOUTS, load_model, make_model, make_samples, make_settings

FAMILIES = ("llama", "qwen2")
TEMPLATE = "{% generation %}{{ messages }}{% endgeneration %}"


def convert_both_ways(rank, folder):
    for family in FAMILIES:
        from_hf(f"{folder}/{family}", f"{folder}/{family}-megatron")
        reset_layout()
        to_hf(f"{folder}/{family}-megatron", f"{folder}/{family}-back")
        reset_layout()


def train_and_return_logits(rank, settings, tokens):
    """Train on this layout, save, and return megatron's logits of some tokens (last stage, all tensor ranks)."""
    from megatron_sstoken.history.source import open_history
    from megatron_sstoken.model.attention import sample_bounds
    from megatron_sstoken.parallel import create_layout
    from megatron_sstoken.training.loop import create_trainer, model_to_train, train
    from megatron_sstoken.validate.agree import agreed_plan

    plan = agreed_plan(settings)
    layout = create_layout(settings.parallel, settings.training.seed)
    model = model_to_train(plan, layout)
    train(create_trainer(plan, layout, model, open_history(plan, layout)))
    (chunk,) = model.unwrapped
    with torch.no_grad():
        position = torch.arange(tokens.shape[1]).unsqueeze(0)
        logits = chunk(tokens, position, None, packed_seq_params=sample_bounds([tokens.shape[1]]))
    return logits[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("conversion")
    for number, family in enumerate(FAMILIES):
        make_model(path / family, family, seed=number)
        (path / family / "special_tokens_map.json").write_text("{}")
    run_distributed(convert_both_ways, 1, str(path))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(folder, family):
    before = load_file(folder / family / "model.safetensors")
    after = load_file(folder / f"{family}-back" / "model.safetensors")
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert (folder / f"{family}-back" / "special_tokens_map.json").read_text() == "{}"
    config = json.loads((folder / f"{family}-back" / "config.json").read_text())
    assert config == json.loads((folder / family / "config.json").read_text())


def test_exported_logits_equal_megatrons(folder, tmp_path):
    num_ranks, parallel = LAYOUTS["tp2"]
    data = write_samples(tmp_path / "data", make_samples(8), template=TEMPLATE)
    settings = make_settings(
        str(folder / "llama"),
        data,
        checkpoint__directory=str(tmp_path / "run"),
        optimizer__learning_rate=1e-2,
        **parallel,
    )
    tokens = torch.randint(0, 99, (1, 64), generator=torch.Generator().manual_seed(0))
    parts = run_distributed(train_and_return_logits, num_ranks, settings, tokens)
    logits = torch.cat(parts, dim=-1)[:, :99]
    run_distributed(export, 1, str(tmp_path / "run"), str(tmp_path / "hf"))
    with torch.no_grad():
        expected = load_model(tmp_path / "hf")(tokens).logits[0]
        untrained = load_model(folder / "llama")(tokens).logits[0]
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{# #}{{ messages }}{# #}", "of the data"
    assert not (tmp_path / "hf-own" / "chat_template.jinja").exists()
    assert open_checkpoint(str(tmp_path / "hf-resharded")).state.chat_template == TEMPLATE
    assert (logits - expected).abs().max() < 1e-4
    assert (logits - untrained).abs().max() > 1e-2, "training should have changed the weights"


def export(rank, checkpoint, output):
    to_hf(checkpoint, output)
    to_hf(checkpoint, f"{output}-own", chat_template="own")
    reshard(checkpoint, f"{output}-resharded")


def test_outputs_are_not_overwritten_and_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="exists: name another --output"):
        to_hf(str(folder / "llama-megatron"), str(folder / "llama-back"))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        to_hf(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="neither model.safetensors"):
        from_hf(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
