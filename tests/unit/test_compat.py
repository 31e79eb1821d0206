"""What differs between the lines of megatron-core: each difference in the form that the installed line has."""

import functools
import logging
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLPSubmodules
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sstoken.compat import (
    COMMON_STATE,
    _ReadObject,
    dense_mlp,
    load_options,
    mark_split,
    silence_announcements,
)


def test_the_feed_forward_part_is_found_in_either_form():
    submodules = MLPSubmodules(linear_fc1=None, linear_fc2=None)
    for described in (
        ModuleSpec(torch.nn.Identity, submodules=submodules),
        functools.partial(int, submodules=submodules),
    ):
        assert dense_mlp(SimpleNamespace(mlp=described)) is submodules
    other = ModuleSpec(torch.nn.Identity, submodules=object())
    assert dense_mlp(SimpleNamespace(mlp=other)) is None


def test_what_is_found_is_what_megatron_builds():
    dense = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    mixture = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=2).submodules
    assert isinstance(dense_mlp(dense), MLPSubmodules) and dense_mlp(mixture) is None


def test_a_parameter_is_marked_once():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for dim in (1, 0):  # the first counts: megatron refuses a second
        mark_split(parameter, dim)
        assert (parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride) == (True, 1, 1)


def test_only_the_announcements_are_silenced(caplog):
    silence_announcements()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    with caplog.at_level(logging.WARNING):
        logger.warning("GPTModel IS DEPRECATED. GPTModel is only …")
        logger.warning("something that matters")
    assert caplog.messages == ["something that matters"]


def test_a_checkpoint_with_its_own_file_needs_nothing(tmp_path):
    (tmp_path / "common.pt").touch()
    assert load_options(tmp_path) == {}


def test_objects_that_run_code_are_refused(tmp_path):
    """A checkpoint may come from anywhere: its pickle gives plain values and tensors, or nothing."""

    class Code:
        def __reduce__(self):
            return print, ("executed",)

    torch.distributed.checkpoint.save({COMMON_STATE: Code()}, checkpoint_id=tmp_path, no_dist=True)
    options = load_options(tmp_path)
    if not options:
        pytest.skip("this line of megatron-core reads the object itself")
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        options["common_strategy"].load_common(tmp_path)
    assert _ReadObject.value is None
