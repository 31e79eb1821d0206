"""What a server says of tokens is read rightly, and what it does not say is told."""

import re

import pytest
import torch

from megatron_sstoken.conversion.served import Predictions, Server, compare_with_server
from tests.helpers.served import echo_of, serving

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


class Random(torch.nn.Module):
    """The same logits for every text of eight tokens."""

    def __init__(self):
        super().__init__()
        self.logits = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens):
        return self


def test_predictions_are_of_the_tokens_that_follow():
    model = Random()
    with serving({"toy": echo_of(model)}) as url:
        for address in (url, f"{url}/", f"{url}/v1"):
            found = Server.at(address).predictions(TOKENS)
    wanted = model.logits[0, :-1].double().log_softmax(dim=-1)
    assert torch.allclose(found.log_probabilities, wanted[range(7), TOKENS[1:]], atol=1e-6)
    assert found.first_choices.tolist() == wanted.argmax(dim=-1).tolist()


def changed(change):
    """A server's answers with `change` made to their log probabilities."""
    right = echo_of(Random())

    def answer(request):
        told = right(request)
        change(told["choices"][0]["logprobs"])
        return told

    return answer


def test_tokens_that_are_named_by_their_texts_tell_no_first_choice():
    def by_text(told):
        told["top_logprobs"] = [None, *({"the": -1.0} for _ in told["top_logprobs"][1:])]

    with serving({"toy": changed(by_text)}) as url:
        found = Server.at(url).predictions(TOKENS)
    assert found.first_choices is None and len(found.log_probabilities) == 7


def test_the_limit_is_the_noise_of_bf16():
    ours = Predictions(torch.tensor([-1.0, -2.0]).double(), torch.tensor([1, 2]))
    half = Predictions(torch.tensor([-1.01, -2.01]).double(), torch.tensor([1, 2]))

    class Fixed(Server):
        def predictions(self, tokens):
            return Predictions(torch.tensor([-1.0 - self.by, -2.0 + self.by]).double(), torch.tensor([1, 3]))

    server = Fixed("http://x", "toy")
    for by, first in ((0.03, None), (0.05, "the log probabilities"), (float("nan"), "the log probabilities")):
        object.__setattr__(server, "by", by)
        (found,) = compare_with_server(server, {"text": [7, 1, 2]}, {"text": ours}, {"text": half})
        assert found.first_difference(4.0) == first and found.agreement == 1 and found.positions == 2
        assert "same first choice at 1" in found.describe(4.0)


def refuse(_):
    raise ValueError("this model's context is 4 tokens")


@pytest.mark.parametrize(
    ("models", "asked", "told"),
    [
        ({"a": refuse, "b": refuse}, None, "has the models a, b: choose with --served_model"),
        ({"a": refuse}, "c", "--served_model: URL has no model 'c', but a"),
        ({"a": refuse}, None, "--served: URL/v1/completions answered 400: .*context is 4 tokens"),
        ({"a": changed(lambda told: told.pop("token_logprobs"))}, None, "does not echo its prompt"),
        ({"a": lambda _: {"choices": []}}, None, "does not echo its prompt"),
        (
            {"a": changed(lambda told: [part.pop() for part in told.values() for _ in "ab"])},
            None,
            "tells of 7 of 8 tokens",
        ),
    ],
)
def test_what_is_missing_is_told(models, asked, told):
    with serving(models) as url, pytest.raises(ValueError, match=told.replace("URL", re.escape(url))):
        Server.at(url, asked).predictions(TOKENS)
    with pytest.raises(ValueError, match="cannot be asked"):  # it has stopped
        Server.at(url)
    with pytest.raises(ValueError, match="must begin with http"):
        Server.at("file:///etc")
