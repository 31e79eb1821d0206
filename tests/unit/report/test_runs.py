"""What a run folder tells, of today and of older versions, whole and damaged."""

import json
from dataclasses import asdict

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_sstoken.config import Settings
from megatron_sstoken.report.runs import changed_settings, open_runs, thinned
from tests.helpers.token_records import Token, write_file


def describe(folder, **start):
    folder.mkdir(parents=True, exist_ok=True)
    earlier = {"start": "2026-01-01T00:00:00Z", "settings": {"selection": {"rho": 0.1}}}
    content = {"format": 1, "starts": [earlier, {"start": "2026-01-02T00:00:00Z", **start}]}
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_run_of_today(tmp_path):
    settings = json.loads(json.dumps(asdict(Settings()), default=str))
    settings["selection"]["rho"] = 0.5
    describe(
        tmp_path / "first",
        settings=settings,
        command=["python", "-m", "x", "--config", "a b.yaml"],
        commit="abc",
        versions={"torch": "2"},
        data={"train": "t"},
        ended="done",
    )
    logs = tmp_path / "first" / "logs"
    logs.mkdir()
    lines = [
        '{"step": 0, "loss/validation": 3.0}',
        '{"step": 10, "loss/validation": 2.0, "speed/mfu": 0.4, "loss/all": NaN}',
    ]
    (logs / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 10, "loss/validation": 1.5}', '{"step": 2']))
    write_file(logs / "records" / "step_0000010.parquet", [(0, [Token()] * 3)])
    write_file(logs / "watched" / "step_0000000.parquet", [(0, [Token()] * 3)])
    write_file(logs / "watched" / "step_0000010.parquet", [(0, [Token()] * 3)])
    for given in (tmp_path / "first", logs):
        (run,) = open_runs([given])
        assert (run.name, run.method, run.commit, run.ended) == ("first", "sstoken", "abc", "done")
        assert run.command == "python -m x --config 'a b.yaml'"
        assert run.start == "2026-01-01T00:00:00Z"
        assert run.curves == {"loss/validation": [(0, 3.0), (10, 1.5)]}
        assert changed_settings(run.settings) == {"selection.rho": 0.5}
        assert [(file.step, file.watched) for file in run.records()] == [(0, True), (10, True), (10, False)]
        assert any("1 lines cannot be read" in note for note in run.notes)


def test_logs_elsewhere_are_found_from_where_the_run_started(tmp_path):
    describe(
        tmp_path / "run",
        settings={"logging": {"directory": "elsewhere"}},
        working_directory=str(tmp_path / "work"),
    )
    (tmp_path / "work" / "elsewhere").mkdir(parents=True)
    (tmp_path / "work" / "elsewhere" / "metrics.jsonl").write_text('{"step": 1, "loss/all": 1.0}\n')
    assert open_runs([tmp_path / "run"])[0].curves == {"loss/all": [(1, 1.0)]}


def test_a_run_of_an_older_version(tmp_path):
    with SummaryWriter(str(tmp_path / "old" / "logs")) as writer:
        for step in (1, 2, 3):
            writer.add_scalar("loss/all", 1 / step, step)
            writer.add_scalar("speed/step_seconds", 1.0, step)
    with SummaryWriter(str(tmp_path / "old" / "logs"), purge_step=3, filename_suffix=".later") as writer:
        writer.add_scalar("loss/all", 9.0, 3)
    for step, method in ((9, "sstoken"), (10, "rho1")):
        checkpoint = tmp_path / "old" / f"step_{step}"
        checkpoint.mkdir()
        state = {"objective": {"selection": {"method": method}, "known": {"a": {}}}}
        (checkpoint / "sstoken.json").write_text(json.dumps(state))
    (run,) = open_runs([tmp_path / "old"])
    assert run.method == "rho1" and run.settings == {"selection": {"method": "rho1"}}
    assert [(step, pytest.approx(value)) for step, value in run.curves["loss/all"]] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert list(run.curves) == ["loss/all"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "logs" / "metrics.jsonl").write_text('{"step": 1, "loss/all": 1.0}\n')
    assert [run.name for run in open_runs(tmp_path / name for name in ("a/run", "b/run", "c"))] == [
        "a/run",
        "b/run",
        "c",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not there: name the folder of a run"),
        (lambda folder: folder.mkdir(), "holds no log of a run"),
        (lambda folder: (folder.mkdir(), (folder / "run.json").write_text("{")), "is not JSON"),
    ],
)
def test_what_is_no_run_is_told(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        open_runs([tmp_path / "run"])


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    curve = [(step, float(step)) for step in range(12_345)]
    short = thinned(curve, 500)
    assert len(short) == 500 and short[0] == curve[0] and short[-1] == curve[-1]
    assert [step for step, _ in short] == sorted({step for step, _ in short})
    assert thinned(curve[:500], 500) == curve[:500]
