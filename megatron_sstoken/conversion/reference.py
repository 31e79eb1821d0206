"""What transformers computes from a Hugging Face folder: hidden states and logits, in fp32 and in float64.

Nobody can be asked to come closer to the truth than transformers' own fp32 does. So the float64 states are what a model is
compared with, and the distance of the fp32 ones from them is the noise that its limit follows from.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

States = dict[str, torch.Tensor]
"""Name → [tokens, width], on the CPU, in the order of computation."""
HEAD = "the vocabulary head"


def check_streaming() -> None:
    """Raise ValueError where the reference cannot be read layer by layer."""
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            "--stream: reading transformers' model layer by layer needs accelerate: pip install accelerate"
        )


class Reference:
    """transformers' model of a folder, in eager mode.

    The whole model in fp32 lies in memory; with `stream` the decoder layers stay on disk, and each is read when it computes (by
    accelerate, which `check_streaming` looks for).
    """

    def __init__(self, hf_path: str, *, stream: bool = False):
        from transformers import AutoConfig, AutoModelForCausalLM

        self._resources = ExitStack()
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
        options["experts_implementation"] = "eager"  # the grouped product knows no float64
        if stream:
            layers = AutoConfig.from_pretrained(hf_path, trust_remote_code=False).num_hidden_layers
            options["device_map"] = dict.fromkeys(
                ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
            ) | {f"model.layers.{layer}": "disk" for layer in range(layers)}
            # For tensors that transformers keeps in another form than the folder; all others are read where they are.
            options["offload_folder"] = self._resources.enter_context(tempfile.TemporaryDirectory())
        self._model = AutoModelForCausalLM.from_pretrained(hf_path, **options).eval()

    def states(self, tokens: list[int]) -> tuple[States, States]:
        """fp32 and float64 states of the embedding, the layers, the final norm, and the logits, at every position."""
        single = self._run(tokens)
        inner = self._model.model
        with computing_in_float64([inner.embed_tokens, *inner.layers, inner.norm, self._model.lm_head]):
            return single, self._run(tokens)

    def close(self) -> None:
        """Forget the model and what it left on disk."""
        del self._model
        self._resources.close()

    @torch.no_grad()
    def _run(self, tokens: list[int]) -> States:
        inner = self._model.model
        modules = {f"layer {number}": layer for number, layer in enumerate(inner.layers)} | {
            "the final norm": inner.norm
        }
        embedded: list[torch.Tensor] = []
        # Not the output of the embedding's module or the head's: some families multiply the one and divide the other.
        handle = inner.layers[0].register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
        try:
            output, states = recorded(modules, lambda: self._model(torch.tensor([tokens]), use_cache=False))
        finally:
            handle.remove()
        return {"the embedding": embedded[0].cpu()[0], **states, HEAD: output.logits.cpu()[0]}


@contextmanager
def computing_in_float64(modules: Any) -> Iterator[None]:
    """Meanwhile each module has float64 weights while it computes, so that no more than one of them takes twice its memory.

    Modules that share a weight must not compute at once. What transformers itself always does in fp32 stays so: angles, norms
    and softmax.
    """

    def widen(module, _inputs):
        module.double()

    def narrow(module, _inputs, _output):
        module.float()

    handles = []
    for module in modules:
        handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(modules: dict[str, torch.nn.Module], run: Callable[[], Any]) -> tuple[Any, States]:
    """`run()`, and the output of each module meanwhile as [tokens, width] on the CPU."""
    states: States = {}

    def keep(name: str) -> Callable:
        def hook(_module, _inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            states[name] = value.detach().cpu().reshape(-1, value.shape[-1])

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        return run(), states
    finally:
        for handle in handles:
            handle.remove()
