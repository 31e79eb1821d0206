"""What a server makes of tokens, beside megatron's model: for models whose transformers no machine at hand can hold.

A server of OpenAI's completions that echoes its prompt (vLLM: `echo` with `logprobs`) tells the log probability of every
token. It computes in bf16, so that no more can be seen than bf16 lets through: the limit follows from how far megatron's own
model in bf16 is from itself in fp32.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sstoken.conversion.logits import Difference, gather_states
from megatron_sstoken.conversion.reference import HEAD
from megatron_sstoken.model.build import Model

TIMEOUT = 600
"""Seconds that a server may take: the first request can wait for the compilation of its kernels."""
_TOKEN_ID = "token_id:"
"""Begins the name of a token that vLLM gives as its number."""


@dataclass(frozen=True)
class Predictions:
    """Of tokens [n] the log probability of each but the first, float64 [n - 1], and the most probable in its place.

    `first_choices` int64 [n - 1]; None where a server does not name tokens by their numbers.
    """

    log_probabilities: torch.Tensor
    first_choices: torch.Tensor | None


@dataclass(frozen=True)
class Server:
    """A model that is served at `url`, which ends before `/v1`."""

    url: str
    model: str

    @classmethod
    def at(cls, url: str, model: str | None = None) -> "Server":
        """The server, which is asked for the models that it has. Raises ValueError if it does not answer, or has another."""
        root = url.rstrip("/").removesuffix("/v1")
        if not root.startswith(("http://", "https://")):
            raise ValueError(f"--served: {url} must begin with http:// or https://")
        try:
            names = [entry["id"] for entry in _ask(f"{root}/v1/models")["data"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"--served: {url}/v1/models does not list models as OpenAI's API does") from error
        if model is None and len(names) != 1:
            raise ValueError(f"--served: {url} has the models {', '.join(names)}: choose with --served_model")
        if model is not None and model not in names:
            raise ValueError(f"--served_model: {url} has no model {model!r}, but {', '.join(names)}")
        return cls(root, model or names[0])

    def predictions(self, tokens: list[int]) -> Predictions:
        """What the model makes of tokens. Raises ValueError for an answer that does not say it."""
        request = {
            "model": self.model,
            "prompt": tokens,
            "max_tokens": 1,  # servers refuse 0
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,  # vLLM's; others ignore it
        }
        answer = _ask(f"{self.url}/v1/completions", request)
        try:
            told = answer["choices"][0]["logprobs"]
            values = [float(value) for value in told["token_logprobs"][1 : len(tokens)]]
            choices = [_first_choice(at) for at in told["top_logprobs"][1 : len(tokens)]]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"--served: {self.url} does not echo its prompt with log probabilities, as vLLM does"
            ) from error
        if len(values) != len(tokens) - 1 or len(choices) != len(values):
            raise ValueError(
                f"--served: {self.url} tells of {len(values) + 1:,} of {len(tokens):,} tokens: switch off what shortens "
                "or extends its prompts"
            )
        known = None if None in choices else torch.tensor(choices)
        return Predictions(torch.tensor(values, dtype=torch.float64), known)


@dataclass(frozen=True)
class ServedComparison:
    """What a server makes of one text, beside megatron's model in fp32."""

    text: str
    positions: int
    difference: Difference
    """Of the tokens' log probabilities; its noise is that of megatron's model in bf16."""
    agreement: int | None
    """Positions at which the most probable token is the same; None: the server does not say."""

    def first_difference(self, factor: float) -> str | None:
        """What differs by more than `factor` times the noise; None if nothing."""
        return self.difference.name if self.difference.exceeds(factor) else None

    def describe(self, factor: float) -> str:
        """The findings, for people."""
        one = self.difference
        same = "" if self.agreement is None else f"; same first choice at {self.agreement}"
        lines = [
            f"{self.text:<12} {self.positions} positions: log probabilities differ from the server's by {one.largest:.2e} at "
            f"most (megatron in bf16 from fp32: {one.largest_noise:.2e})",
            f"             differences {one.ratio:.2f} times that noise (limit {factor:g}){same}",
        ]
        return "\n".join(lines)

    def table(self) -> str:
        """One line: a server tells nothing of its layers."""
        one = self.difference
        return f"{self.text}: root mean square difference {one.rms:.2e}, noise {one.rms_noise:.2e} nats"


def compare_with_server(
    server: Server, texts: Mapping[str, list[int]], single: Mapping[str, Predictions], half: Mapping[str, Predictions]
) -> list[ServedComparison]:
    """Compare what `server` makes of texts with megatron's predictions in fp32, whose noise are those in bf16."""
    found = []
    for text, ours in single.items():
        theirs = server.predictions(texts[text])
        difference = Difference.of(
            "the log probabilities", theirs.log_probabilities, half[text].log_probabilities, ours.log_probabilities
        )
        agreement = None
        if theirs.first_choices is not None and ours.first_choices is not None:
            agreement = int(theirs.first_choices.eq(ours.first_choices).sum())
        found.append(ServedComparison(text, len(texts[text]) - 1, difference, agreement))
    return found


def predict(model: Model, texts: Mapping[str, list[int]]) -> dict[str, Predictions]:
    """What megatron's model makes of texts, on the first rank; the others get none. All ranks call it."""
    found = {}
    for text, tokens in texts.items():
        states = gather_states(model, tokens)
        if states is not None:
            logits = states[HEAD][:-1].double().log_softmax(dim=-1)
            places = torch.tensor(tokens[1:]).unsqueeze(-1)
            found[text] = Predictions(logits.gather(-1, places).squeeze(-1), logits.argmax(dim=-1))
    return found


def _first_choice(candidates: Mapping[str, float]) -> int | None:
    """The most probable token of those that a server names (the prompt's own is among them); None: by text, not number."""
    name = max(candidates, key=lambda one: candidates[one])
    number = name.removeprefix(_TOKEN_ID)
    return int(number) if number != name and number.isdecimal() else None


def _ask(url: str, request: Mapping[str, Any] | None = None) -> Any:
    """The JSON that a server answers. Raises ValueError where it does not."""
    data = None if request is None else json.dumps(request).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        told = error.read(500).decode(errors="replace")
        raise ValueError(f"--served: {url} answered {error.code}: {told}") from error
    except OSError as error:  # URLError too
        raise ValueError(f"--served: {url} cannot be asked: {getattr(error, 'reason', error)}") from error
    except ValueError as error:
        raise ValueError(f"--served: {url} does not answer in JSON") from error
