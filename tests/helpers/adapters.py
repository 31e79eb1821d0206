"""Adapters of a model by PEFT's names: filled, read and put together again from all ranks."""

import torch

from megatron_sstoken.config.model import LINEARS
from tests.reference.hf_reference import Objective, loss_and_gradients


def named_adapters(model):
    """PEFT's names → (parameter on this rank, axis that tensor parallel splits or None)."""
    from megatron_sstoken.model.lora import linears_of_layer
    from megatron_sstoken.model.lora_places import adapter_places
    from megatron_sstoken.model.lora_targets import expert_of, peft_name

    places = adapter_places(model.architecture, LINEARS)
    paths = {
        (place.linear, target): f"{place.path.rpartition('.')[0]}.{target}" if place.in_stack else place.path
        for place in places
        for target in place.targets
    }
    found = {}
    for chunk in model.unwrapped:
        for layer in chunk.decoder.layers:
            for path, linear in linears_of_layer(layer):
                for target, adapter in linear.adapters.items():
                    for name, parameter in adapter.named_parameters():
                        peft = peft_name(layer.layer_number - 1, paths[path, target], name)
                        whole = expert_of(path) is not None
                        found[peft] = (parameter, None if whole else linear.adapter_axis.get(name))
    return found


def rules_of_rows(architecture):
    """PEFT's names of matrices whose rows lie in another order here → how they are made of PEFT's."""
    from megatron_sstoken.model.lora_places import adapter_places

    rules = [
        place.rule("", layer, matrix)
        for place in adapter_places(architecture, LINEARS)
        if place.blocks
        for layer in place.layers
        for matrix in ("lora_B", "magnitude")
    ]
    return {rule.hugging_face[0]: rule for rule in rules}


def set_adapters(model, tensors):
    """Fill this rank's slices."""
    from megatron_sstoken.model.weights import interleaved

    rules = rules_of_rows(model.architecture)
    for name, (parameter, axis) in named_adapters(model).items():
        whole = tensors[name]
        if name in rules:
            whole = interleaved(rules[name], [whole], model.architecture)
        if axis is not None:
            whole = whole.chunk(model.layout.tensor_size, dim=axis)[model.layout.tensor_rank]
        with torch.no_grad():
            parameter.copy_(whole)


def loss_of_first_batch(trainer):
    """Train on the run's first batch but for the optimizer's step; the loss, with gradients left where megatron has them."""
    from megatron_sstoken.training.metrics import summarize
    from megatron_sstoken.training.selector import selector_of, train_on_selected

    trainer.model.zero_gradients()
    selector = selector_of(trainer.settings, trainer.layout, gamma=0.5, step=0)
    reports = train_on_selected(trainer.model, trainer.loader.load(0), selector, whole_gradients=True)
    return summarize(reports, trainer.model.architecture, trainer.layout).loss_selected


def gather_gradients(model, others=None):
    """Whole gradients of all adapters by PEFT's names, on every rank.

    `others`: more of this rank's slices, each with the axis that tensor parallel splits or None.
    """
    from megatron_sstoken.model.weights import to_hugging_face

    mine = {name: (one.main_grad.clone(), axis) for name, (one, axis) in named_adapters(model).items()}
    layout, mine = model.layout, mine | (others or {})
    parts = [None] * layout.world_size
    told = {name: (layout.tensor_rank, axis, slice_) for name, (slice_, axis) in mine.items()}
    torch.distributed.all_gather_object(parts, told)
    found = whole(parts)
    for name, rule in rules_of_rows(model.architecture).items():
        if name in found:
            ((_, found[name]),) = to_hugging_face(rule, 0, found[name], model.architecture)
    return found


def whole(parts):
    """Slices of all ranks → whole matrices by PEFT's names; copies must agree."""
    result = {}
    for name in {name for part in parts for name in part}:
        found = [part[name] for part in parts if name in part]
        slices = {rank: gradient for rank, _, gradient in found}
        axis = found[0][1]
        ordered = [slices[number] for number in sorted(slices)]
        result[name] = ordered[0] if axis is None else torch.cat(ordered, dim=axis)
        for other in ordered[1:] if axis is None else []:
            torch.testing.assert_close(other, ordered[0])
    return result


def logits_of(model, tokens):
    """[tokens, words / tensor size] of `tokens`, int64 [1, length]."""
    from megatron_sstoken.model.attention import sample_bounds

    model.train(False)
    with torch.no_grad():
        length = tokens.shape[1]
        bounds = sample_bounds([length])
        return model.unwrapped[0](tokens, torch.arange(length).unsqueeze(0), None, packed_seq_params=bounds)[0]


def train_peft(model, samples, learning_rate, num_steps, masks=None):
    """Train PEFT's model as a run does by default, on the same batch each step; each step's loss.

    `masks`: name of a parameter → what its gradient is multiplied by.
    """
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(num_steps):
        loss, gradients = loss_and_gradients(model, samples, Objective())
        losses.append(loss)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name] * (masks or {}).get(name, 1)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
    return losses
