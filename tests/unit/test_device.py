"""The adaptation to machines without CUDA leaves everything else as it was; in a process of its own."""

import subprocess
import sys

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


def test_adaptation_in_a_fresh_process():
    result = subprocess.run([sys.executable, "-c", CHECK], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
