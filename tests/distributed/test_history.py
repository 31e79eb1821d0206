"""History losses: every token's value, resumed after a stop with another batch size, cut and dropped samples as NaN."""

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_sstoken.data.column import TokenColumn
from megatron_sstoken.data.store import SampleStore
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import load_model, make_model, make_samples, make_settings, make_store
from tests.reference.hf_reference import token_losses

SAMPLES = make_samples(21, seed=8)


def score_history(rank, settings, stop_after):
    """Score, stopping after some batches by an exception; returns whether it finished."""
    from megatron_sstoken.history.source import open_history
    from megatron_sstoken.parallel import create_layout
    from megatron_sstoken.passes import scoring
    from megatron_sstoken.validate.agree import agreed_plan

    if stop_after is not None:
        original, done = scoring.score_batch, []

        def score_batch(*args):
            if len(done) == stop_after:
                raise KeyboardInterrupt
            done.append(1)
            return original(*args)

        scoring.score_batch = score_batch
    plan = agreed_plan(settings)
    layout = create_layout(settings.parallel, 0)
    try:
        open_history(plan, layout)
    except KeyboardInterrupt:
        return False
    return True


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    model = make_model(folder / "model")
    data = make_store(folder / "data", SAMPLES)
    reference = load_model(model)
    return folder, model, data, [token_losses(reference, sample.tokens) for sample in SAMPLES]


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_values_after_a_stop_and_another_batch_size(bench, tmp_path, too_long):
    folder, model, data, losses = bench
    path, length = str(tmp_path / "losses"), 40

    def settings(global_batch, packing):
        return make_settings(
            model,
            data,
            history__store=path,
            data__sequence_length=length,
            data__too_long=too_long,
            data__packing=packing,
            training__global_batch_size=global_batch,
            logging__context_loss=True,
        )

    assert run_distributed(score_history, 2, settings(4, False), 1) == [False, False]
    with pytest.raises(ValueError, match="incomplete"):
        TokenColumn(path)
    assert run_distributed(score_history, 1, settings(6, True), None) == [True]
    store, column = SampleStore(data), TokenColumn(path)
    for index, expected in enumerate(losses):
        wanted = np.array([np.nan if loss is None else loss for loss in expected])
        wanted[length:] = np.nan
        if too_long == "drop" and len(wanted) > length:
            wanted[:] = np.nan
        found = column.values(store.offsets[index], store.offsets[index + 1])
        np.testing.assert_allclose(found, wanted, atol=5e-4)


def told_while_scoring(rank, settings):
    """What each process is told where history cannot be scored."""
    from megatron_sstoken.config import SettingsError

    try:
        score_history(rank, settings, None)
    except SettingsError as error:
        return error.problems
    return []


def test_losses_that_are_not_finite_end_the_scoring(bench, tmp_path):
    folder, model, data, _ = bench
    broken = shutil.copytree(model, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = make_settings(str(broken), data, history__store=str(tmp_path / "losses"), parallel__pipeline=2)
    told = run_distributed(told_while_scoring, 2, settings)
    assert told[0] == told[1] and "is nan: check the weights of history.hf_path" in told[0][0]
    with pytest.raises(ValueError, match="incomplete"):
        TokenColumn(tmp_path / "losses")
