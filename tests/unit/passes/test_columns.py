"""Token reports as columns: what is undefined, and the order in which they are gathered."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sstoken.passes.columns import columns_of, gather_columns
from megatron_sstoken.training.records import SCHEMA
from tests.helpers.token_batches import TURNS, make_batch, make_report


@pytest.fixture(scope="module")
def layout():
    """A layout of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(is_replica_leader=True, is_writer=True, data=dist.group.WORLD, data_size=1)
    dist.destroy_process_group()


def test_columns_token_by_token():
    batch = make_batch(TURNS, 7, first_sample=5)
    report = make_report(batch)
    entropy, top1 = torch.rand(2, len(report.loss)).unbind()
    weight = torch.rand(len(report.loss))
    report = replace(report, values={**report.values, "entropy": entropy, "top1": top1}, weight=weight)
    columns = columns_of(report)
    row = 0
    for number, roles in enumerate(TURNS):
        for i, role in enumerate(roles):
            t = 7 * number + i
            in_response = role == 1 and i > 0
            found = {name: values[row].item() for name, values in columns.items()}
            assert (found["sample"], found["position"], found["role"]) == (5 + 2 * number, i, role)
            assert found["token"] == int(batch.tokens[0, t])
            assert found["selected"] == bool(report.selection.mask[t])
            for name, values, defined in (
                ("loss", report.loss, i > 0),
                ("history_loss", batch.history_loss, i > 0),
                ("rel_norm", report.selection.rel_norm, in_response),
                ("attention", report.values["attention"], in_response),
                ("score", report.selection.score, in_response),
                ("weight", weight, found["selected"]),
                ("entropy", entropy, True),  # as the report has it: NaN where nothing was predicted
                ("top1", top1, True),
            ):
                np.testing.assert_equal(found[name], float(values[t]) if defined else np.nan, err_msg=f"{name} {row}")
            row += 1
    assert {len(values) for values in columns.values()} == {row}
    assert columns.keys() == {*SCHEMA.names} - {"text"} and columns["selected"].any()


def test_columns_without_selection_history_and_attention():
    report = make_report(make_batch(TURNS, 7, history=False), selected=False, attention=False)
    columns = columns_of(report)
    for name in ("history_loss", "rel_norm", "attention", "score", "weight", "entropy", "top1"):
        assert np.isnan(columns[name]).all()
    assert not columns["selected"].any() and columns["selected"].dtype == bool
    assert (~np.isnan(columns["loss"])).sum() == 5 + 3 + 1


def test_gathered_columns_are_sorted(layout):
    """Samples 8 and 10, then 2, 4 and 6, then a micro-batch of padding."""
    batches = [
        make_batch(TURNS[:2], 7, first_sample=8),
        make_batch(TURNS, 7, first_sample=2, seed=1),
        make_batch([], 7, num_rows=1),
    ]
    reports = [make_report(batch, seed=number) for number, batch in enumerate(batches)]
    columns = gather_columns(reports, layout)
    roles = {2: TURNS[0], 4: TURNS[1], 6: TURNS[2], 8: TURNS[0], 10: TURNS[1]}
    keys = [(sample, i) for sample, row in roles.items() for i in range(len(row))]
    assert list(zip(columns["sample"].tolist(), columns["position"].tolist(), strict=True)) == keys
    assert columns["role"].tolist() == [role for row in roles.values() for role in row]
    # what belongs to a token moved along with it
    parts = [columns_of(report) for report in reports]
    for name in ("token", "loss", "score", "selected"):
        wanted = {
            key: value
            for part in parts
            for *key, value in zip(part["sample"], part["position"], part[name], strict=True)
            for key in [tuple(key)]
        }
        np.testing.assert_array_equal(columns[name], [wanted[key] for key in keys], err_msg=name)


def test_others_do_not_gather():
    assert gather_columns([], SimpleNamespace(is_replica_leader=False)) is None


def test_columns_do_not_share_memory_with_later_steps():
    """Reports are gathered after the step: what they hold must not change with the next batch's tensors."""
    report = make_report(make_batch(TURNS, 7))
    columns = columns_of(report)
    before = columns["loss"].copy()
    report.loss.add_(1.0)
    np.testing.assert_array_equal(columns["loss"], before)
    assert isinstance(report.loss, torch.Tensor)
