"""A checkpoint holds the random states, keeps the newest, and is never half there."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sstoken.checkpoint.manifest import RunIdentity, RunState, checkpoint_steps, open_checkpoint
from megatron_sstoken.checkpoint.save_load import load_checkpoint, save_checkpoint
from megatron_sstoken.config import Settings
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model

IDENTITY = RunIdentity("data", 128, "truncate", True, True, 1, 8)


def save_draw_and_load(rank, folder, model_path):
    from megatron.core import tensor_parallel

    from megatron_sstoken.model.build import build_model, load_weights
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.model.optimizer import build_optimizer
    from megatron_sstoken.parallel import create_layout

    settings = Settings()
    settings.parallel.tensor, settings.training.precision = 2, "fp32"
    layout = create_layout(settings.parallel, seed=3)
    model = build_model(read_architecture(model_path), settings, layout, trainable=True)
    load_weights(model, model_path)
    optimizer, scheduler = build_optimizer(model, settings.optimizer, 10)

    def draw():
        with tensor_parallel.get_cuda_rng_tracker().fork():
            inside = torch.rand(3)
        return torch.cat([torch.rand(3), inside]).tolist()

    for group in optimizer.param_groups:
        group["fused"] = None  # as older checkpoints have it
    for step in (1, 2, 3):
        folder_of_step = save_checkpoint(
            folder, RunState(step, IDENTITY, model_path), model, optimizer, scheduler, keep=2
        )
    first = draw()
    draw()
    load_checkpoint(open_checkpoint(str(folder_of_step)), model, optimizer, scheduler)
    assert all(group["fused"] for group in optimizer.param_groups)
    return first, draw()


def test_random_states_come_back_and_old_checkpoints_go(tmp_path):
    model = make_model(tmp_path / "model")
    for name in ("step_0000009.partial", "step_0000001"):  # as a killed run leaves them: a save, a deletion
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "__0_0.distcp").write_bytes(b"half")
    for name in ("step_0000008.partial", "step_notes"):  # holds, or is, what no checkpoint has
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "mine.txt").write_text("mine")
    results = run_distributed(save_draw_and_load, 2, str(tmp_path / "run"), model)
    for before, after in results:
        assert before == after
    assert results[0][0][3:] != results[1][0][3:], "tensor ranks draw differently inside the tracker's fork"
    assert list(checkpoint_steps(str(tmp_path / "run"))) == [2, 3]
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["step_0000002", "step_0000003", "step_0000008.partial", "step_notes"]


class NewBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made, or read, and are not views of others."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {place_of(value) for value in tree_leaves((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        new = {place_of(value): value for value in tree_leaves(made)}
        self.count += sum(new[place].untyped_storage().nbytes() for place in new.keys() - given - {0})
        return made


def place_of(value):
    """Where the memory of a tensor begins; 0 where it has none."""
    return value.untyped_storage().data_ptr() if type(value) in (torch.Tensor, torch.nn.Parameter) else 0


def count_bytes(rank, folder, model_path):
    """What a rank holds of the optimizer's state, and what it makes beside that to save it and to load it."""
    from megatron.core import dist_checkpointing

    from megatron_sstoken.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.families import read_architecture
    from megatron_sstoken.model.optimizer import build_optimizer
    from megatron_sstoken.parallel import create_layout

    settings = Settings()
    layout = create_layout(settings.parallel, seed=3)
    model = build_model(read_architecture(model_path), settings, layout, trainable=True)
    optimizer, _ = build_optimizer(model, settings.optimizer, 10)
    metadata = {"dp_cp_group": layout.groups.dp_cp}
    weights = model.unwrapped[0].sharded_state_dict(metadata=metadata)

    def state(is_loading):
        return {"optimizer": sharded_optimizer_state(optimizer, weights, metadata, is_loading=is_loading)}

    state(is_loading=False)  # AdamW's first state
    with NewBytes() as saving:
        content = state(is_loading=False)
    dist_checkpointing.save(content, folder)
    with NewBytes() as loading:
        load_optimizer_state(optimizer, dist_checkpointing.load(state(is_loading=True), folder)["optimizer"])
    held = 3 * sum(group.numel() for groups in optimizer.param_groups for group in groups["params"])
    return 4 * held, saving.count, loading.count, 12 * sum(value.numel() for value in model.chunks[0].parameters())


def test_a_rank_makes_no_more_of_the_optimizers_state_than_it_holds(tmp_path):
    """megatron's own form makes, on each rank, all that the ranks hold together, twice and more."""
    (tmp_path / "state").mkdir()
    counted = run_distributed(count_bytes, 4, str(tmp_path / "state"), make_model(tmp_path / "model"))
    assert sum(held for held, *_ in counted) == counted[0][-1]
    for held, saving, loading, together in counted:
        assert held < 0.4 * together
        assert saving < 0.02 * held, "it is told where it lies, and copied when it is written"
        assert loading < 3 * held, "each piece is read, and copied into place"
