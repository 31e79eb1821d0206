"""Pipeline stages with unequal numbers of layers compute what one stage does, and their checkpoints are the same."""

import numpy as np
import pytest

from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference, run_cases
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

GLOBAL_BATCH = 4
STAGES = {
    # Layers, pipeline, chunks, what is set; the layers, from 0, of every chunk of every stage.
    "1+2": (3, 2, 1, {"first_stage_layers": 1}, [[[0]], [[1, 2]]]),
    "2+1": (3, 2, 1, {"last_stage_layers": 1}, [[[0, 1]], [[2]]]),
    "3+2": (5, 2, 1, {"first_stage_layers": 3, "last_stage_layers": 2}, [[[0, 1, 2]], [[3, 4]]]),
    "2+4 in chunks": (6, 2, 2, {"first_stage_layers": 2, "last_stage_layers": 4}, [[[0], [3]], [[1, 2], [4, 5]]]),
    "1+2+1": (4, 3, 1, {"first_stage_layers": 1, "last_stage_layers": 1}, [[[0]], [[1, 2]], [[3]]]),
}


def settings_of(folder, layers, pipeline=1, chunks=1, given=(), **changes):
    values = {
        "history__hf_path": f"{folder}/{layers}-history",
        "history__store": f"{folder}/{layers}-losses",
        "selection__layer": [0, 1, layers - 1],
        "training__global_batch_size": GLOBAL_BATCH,
        "training__steps": 1,
        "parallel__pipeline": pipeline,
        "parallel__virtual_pipeline": chunks,
    }
    stages = {f"parallel__{name}": value for name, value in dict(given).items()}
    return make_settings(f"{folder}/{layers}", f"{folder}/data", **(values | stages | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of 3 to 6 layers, their history models, data."""
    folder = tmp_path_factory.mktemp("stages")
    make_store(folder / "data", make_samples(GLOBAL_BATCH * 4, seed=3))
    for layers in range(3, 7):
        make_model(folder / str(layers), seed=layers, num_hidden_layers=layers)
        make_model(folder / f"{layers}-history", seed=10 + layers, num_hidden_layers=layers)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Layers → loss, records and gradients of one stage."""
    (results, *_) = run_distributed(run_cases, 1, [settings_of(folder, layers) for layers in range(3, 7)], timeout=200)
    return dict(zip(range(3, 7), results, strict=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", STAGES)
def test_losses_selection_and_gradients_are_those_of_one_stage(folder, whole, name):
    layers, pipeline, chunks, given, held = STAGES[name]
    settings = settings_of(folder, layers, pipeline, chunks, given)
    assert settings.parallel.stage_layers(layers) == [sum(map(len, stage)) for stage in held]
    assert run_distributed(layers_held, pipeline, settings) == held
    loss, columns, gradients = run_distributed(run_cases, pipeline, [settings], timeout=250)[0][0]
    wanted_loss, wanted_columns, wanted_gradients = whole[layers]
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    for column in ("sample", "position", "selected"):
        np.testing.assert_array_equal(columns[column], wanted_columns[column])
    np.testing.assert_allclose(columns["attention"], wanted_columns["attention"], atol=1e-5)
    assert largest_difference(gradients, wanted_gradients) < 1e-4


def layers_held(rank, settings):
    """Numbers from 0 of the layers of each chunk of this rank, as its modules say."""
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.parallel import create_layout

    layout = create_layout(settings.parallel, seed=0)
    model = build_model(read_architecture(settings.model.hf_path), settings, layout, trainable=False)
    return [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in model.unwrapped]


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("1+2", "one"), ("one", "2+1")])
def test_checkpoints_go_on_with_other_stages(folder, tmp_path, before, after):
    """Four steps at once, and two and two with other stages in between."""
    layouts = {"one": (3, 1, 1, {}), **{name: stages[:4] for name, stages in STAGES.items()}}

    def train(layout, directory, steps):
        layers, pipeline, chunks, given = layouts[layout]
        changes = {"checkpoint__directory": str(directory), "training__steps": steps}
        settings = settings_of(folder, layers, pipeline, chunks, given, **changes)
        return run_distributed(train_and_save, pipeline, settings, timeout=120)[-1]

    straight = train("one", tmp_path / "straight", 4)
    train(before, tmp_path / "changed", 2)
    resumed = train(after, tmp_path / "changed", 4)
    assert len(straight) == 4 and len(resumed) == 2
    for found, wanted in zip(resumed, straight[2:], strict=True):
        assert found["num_selected"] == wanted["num_selected"]
        assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def train_and_save(rank, settings):
    """Each remaining step's loss and norm; a checkpoint at the end."""
    from megatron_sstoken.training.loop import save, training_step
    from tests.helpers.workbench import make_trainer

    trainer = make_trainer(settings)
    steps = []
    for number in range(trainer.step, trainer.plan.num_steps):
        metrics, norm, _ = training_step(trainer, number)
        trainer.step = number + 1
        steps.append({"loss": metrics.loss_selected, "grad_norm": norm, "num_selected": metrics.num_selected})
    save(trainer)
    return steps
