"""transformers' states in fp32 and float64, from memory and layer by layer from the disk."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sstoken.conversion import reference as module
from megatron_sstoken.conversion.reference import HEAD, Reference, check_streaming
from tests.helpers.workbench import make_model

TOKENS = list(range(5, 69))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference")
    for family in ("llama", "mixtral"):
        make_model(path / family, family, vocab_size=96)
    return path


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_states_are_those_of_the_whole_model_in_either_precision(folders, family):
    reference = Reference(str(folders / family))
    for dtype, found in zip((torch.float32, torch.float64), reference.states(TOKENS), strict=True):
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folders / family, dtype=dtype, **eager).eval()
        with torch.no_grad():
            expected = model(torch.tensor([TOKENS]), output_hidden_states=True)
        assert list(found) == ["the embedding", *(f"layer {n}" for n in range(4)), "the final norm", HEAD]
        assert found[HEAD].dtype == dtype and torch.equal(found[HEAD], expected.logits[0])
        assert torch.equal(found["layer 1"], expected.hidden_states[2][0])
        assert torch.equal(found["the final norm"], expected.hidden_states[-1][0])
    assert all(parameter.dtype == torch.float32 for parameter in reference._model.parameters()), "narrow again"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_read_layer_by_layer_the_states_are_the_same(folders, family):
    whole, streamed = Reference(str(folders / family)), Reference(str(folders / family), stream=True)
    layers = dict(streamed._model.named_parameters())
    assert all(layers[name].device.type == "meta" for name in layers if ".layers." in name), "none stays in memory"
    for expected, found in zip(whole.states(TOKENS), streamed.states(TOKENS), strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    streamed.close()


def test_streaming_without_accelerate_is_told(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install accelerate"):
        check_streaming()
