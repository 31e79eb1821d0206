"""The adaptation to machines without CUDA leaves everything else as it was; in a process of its own."""

import subprocess
import sys

import pytest

from tests.helpers.cli import ROOT, environment

CHECK = """
import torch
from megatron_sstoken.device import adapt_megatron_to_cpu, compute_device
adapt_megatron_to_cpu()
adapt_megatron_to_cpu()
assert compute_device() == torch.device("cpu")
assert torch.zeros(2, device="cuda").device.type == "cpu" and torch.ones(1).cuda().device.type == "cpu"
assert torch.tensor([1.0], device="cuda:0").type() == "torch.cuda.FloatTensor"
assert torch.tensor([1.0]).type(torch.int32).dtype == torch.int32
with torch.device("meta"):  # transformers builds models so
    made = [torch.empty(2), torch.zeros(2), torch.arange(2), torch.full((2,), 1.0), torch.tensor([1])]
assert all(tensor.is_meta for tensor in made), made
assert torch.zeros(2, device="meta").is_meta

import tempfile
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
with tempfile.TemporaryDirectory() as folder:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
assert again.model.rotary_emb.inv_freq[0] == 1.0
"""


# Without Transformer Engine the router of a mixture wants a name that nobody has defined: on GPUs, too.
ON_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda device: None
from megatron_sstoken.device import adapt_megatron_to_cpu
adapt_megatron_to_cpu()
from megatron.core.transformer.moe.moe_utils import router_gating_linear
inputs, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
logits = router_gating_linear(inputs, weight, None, torch.float32)
assert logits.tolist() == [[3.0] * 4] * 2
logits.sum().backward()
assert inputs.grad.tolist() == [[4.0] * 3] * 2
"""


@pytest.mark.parametrize(("check", "device"), [(CHECK, "cpu"), (ON_A_GPU, "")], ids=["cpu", "gpu"])
def test_adaptation_in_a_fresh_process(check, device):
    variables = environment() | {"SSTOKEN_DEVICE": device}
    result = subprocess.run([sys.executable, "-c", check], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# What megatron's optimizers find where Transformer Engine is installed: its Adam and norms, which need a GPU.
FUSED = """
import torch
import megatron.core.optimizer as optimizers
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron_sstoken.device import adapt_megatron_to_cpu
class NeedsGpu:
    def __call__(self, *_, **__): raise RuntimeError("no CUDA")
for module, names in (
    (optimizers, "Adam SGD"),
    (distrib_optimizer, "Adam"),
    (clip_grads, "multi_tensor_applier l2_norm_impl multi_tensor_scale_impl"),
    (optimizer, "multi_tensor_applier multi_tensor_scale_impl"),
):
    for name in names.split():
        assert hasattr(module, name), (module, name)
        setattr(module, name, NeedsGpu())
optimizers.USING_PYTORCH_OPTIMIZER = False
distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
adapt_megatron_to_cpu()
assert optimizers.Adam is torch.optim.AdamW and distrib_optimizer.Adam is torch.optim.Adam
assert optimizers.USING_PYTORCH_OPTIMIZER
assert not distrib_optimizer.HAVE_APEX_OR_TE and not distrib_optimizer.USING_TE_OPTIMIZER
norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [[torch.tensor([3.0, 4.0])]], False)
assert float(norm) == 5.0, norm
"""


def test_fused_optimizers_of_gpus_are_left_alone_on_a_cpu():
    env = environment() | {"SSTOKEN_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", FUSED], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
