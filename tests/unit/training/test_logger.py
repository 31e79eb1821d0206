"""The log of a run: printed lines, TensorBoard and `metrics.jsonl`."""

import json
import math
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from megatron_sstoken.folders import METRICS
from megatron_sstoken.training.logger import StepLogger
from megatron_sstoken.training.metrics import StepMetrics
from megatron_sstoken.training.metrics_file import MetricsFile, read_metrics
from megatron_sstoken.training.tags import GROUPS, metric_of, tag_of
from tests.helpers.cli import scalars


def metrics_with(**changes) -> StepMetrics:
    values = {
        "loss_selected": 1.5,
        "loss_all": 1.25,
        "loss_dropped": 1.0,
        "dropped_excess": -0.5,
        "num_selected": 30,
        "num_response": 60,
        "num_tokens": 100,
        "num_positions": 400,
        "model_flops": 1e9,
        "rel_quantiles": (0.1, 0.2, 0.3, 0.4, 0.5),
        "attention_quantiles": (0.6, 0.7, 0.8, 0.9, 1.0),
    }
    return StepMetrics(**(values | changes))


RANK_0 = SimpleNamespace(rank=0, world_size=2)


def test_log_prints_every_few_steps_and_the_last(tmp_path, capsys):
    logger = StepLogger(str(tmp_path), 2, 5, RANK_0)
    for number in range(1, 6):
        logger.step(number, metrics_with(), 0.5, 1e-4)
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    for part in (
        "loss 1.5000 (all 1.2500, dropped 1.0000)",
        "selected 50.0 %",
        "grad norm 0.500",
        "lr 1.000e-04",
        "tokens/s",
        "TFLOP/s",
    ):
        assert part in lines[0]
    assert lines[2].endswith("ETA 0:00:00")
    assert scalars(tmp_path, "loss/selected") == {2: 1.5, 4: 1.5, 5: 1.5}
    assert scalars(tmp_path, "selection/share")[2] == 0.5 and scalars(tmp_path, "data/real_share")[2] == 0.25
    assert scalars(tmp_path, "optimizer/gradient_norm")[2] == 0.5
    assert scalars(tmp_path, "rel/q05")[2] == pytest.approx(0.1)
    assert scalars(tmp_path, "attention/q95")[2] == pytest.approx(1.0)
    speed = scalars(tmp_path, "speed/tokens_per_second")[4] * scalars(tmp_path, "speed/step_seconds")[4]
    assert speed == pytest.approx(100, rel=1e-3), "real tokens, not positions"
    ratio = scalars(tmp_path, "speed/model_tflops")[4] / scalars(tmp_path, "speed/model_tflops_per_process")[4]
    assert ratio == pytest.approx(2.0, rel=1e-3)


def test_log_leaves_out_what_is_undefined(tmp_path):
    logger = StepLogger(str(tmp_path), 1, 2, RANK_0)
    logger.step(1, metrics_with(loss_dropped=math.nan), 0.5, 1e-4)
    logger.step(2, metrics_with(), 0.5, 1e-4)
    logger.close()
    assert scalars(tmp_path, "loss/dropped") == {2: 1.0} and set(scalars(tmp_path, "loss/all")) == {1, 2}


def test_other_ranks_hold_their_peace(tmp_path, capsys):
    logger = StepLogger(str(tmp_path / "logs"), 1, 2, SimpleNamespace(rank=1, world_size=2))
    logger.step(1, metrics_with(), 0.5, 1e-4)
    logger.say("something")
    logger.scalars(1, {"loss/validation": 1.0})
    logger.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "logs").exists()


def test_tags_sort_in_the_order_of_reading():
    """TensorBoard sorts them by name."""
    metrics = [metric for group in GROUPS.values() for metric in group]
    tags = [tag_of(f"{metric}x" if metric.endswith("/") else metric) for metric in metrics]
    assert tags == sorted(tags) and tags[0] == "1 loss/1 validation" and tags[5] == "1 loss/6 dropped − history"
    assert tag_of("loss/source/a/b") == "2 loss by source/1 training/a/b"
    for metric in ("loss/validation", "loss/validation/a/b", "loss/source/all", "rel/q05", "memory/peak_gib"):
        assert metric_of(tag_of(metric)) == metric
    assert metric_of("loss/selected") == "loss/selected", "of an earlier version"
    with pytest.raises(KeyError):
        tag_of("a/b")


def test_metrics_file(tmp_path):
    logger = StepLogger(str(tmp_path), 2, 4, RANK_0, peak=1e12)
    logger.scalars(0, {"loss/validation": 3.0, "loss/validation/maths": 2.0})
    logger.step_is_over()
    for number in range(1, 5):
        of_sources = {"maths": (6.0, 4), "chat": (0.0, 0)}
        logger.step(number, metrics_with(of_sources=of_sources, loss_history=0.75), math.inf, 1e-4)
        if number == 3:
            logger.scalars(number, {"loss/validation": 2.5})
        logger.step_is_over()
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3, 4]
    assert lines[0].keys() == {"step", "time", "loss/validation", "loss/validation/maths"}
    assert lines[2].keys() == {"step", "time", "loss/validation"} and lines[2]["time"].endswith("Z")
    step = lines[3]
    assert (step["loss/selected"], step["loss/history"], step["loss/source/maths"]) == (1.5, 0.75, 1.5)
    assert not {"loss/source/chat", "selection/rho", "optimizer/gradient_norm"} & step.keys(), (
        "undefined, or not finite"
    )
    assert step["speed/mfu"] == pytest.approx(step["speed/model_tflops"] / 2)
    assert scalars(tmp_path, "loss/source/maths") == {2: 1.5, 4: 1.5}
    assert scalars(tmp_path, "loss/validation") == {0: 3.0, 3: 2.5}


def test_mfu_is_left_out_where_the_peak_is_not_known(tmp_path):
    logger = StepLogger(str(tmp_path), 1, 1, RANK_0)
    logger.step(1, metrics_with(), 0.5, 1e-4)
    logger.close()
    assert "speed/mfu" not in read_metrics(tmp_path / METRICS)[0]


def test_a_resumed_run_cuts_the_lines_after_its_step(tmp_path):
    path = tmp_path / METRICS
    whole = "".join(json.dumps({"step": step, "time": "", "loss/all": 1.0}) + "\n" for step in range(6))
    for resumed, kept in ((3, [0, 1, 2, 3]), (None, [])):
        path.write_text(whole + '{"step": 6, "lo')  # as a killed run leaves it
        file = MetricsFile(path, resumed=resumed)
        file.add(9, {"loss/all": 2.0})
        file.write()
        assert [line["step"] for line in read_metrics(path)] == [*kept, 9]
        assert path.read_text().endswith("2.0}\n")


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path, capsys):
    logger = StepLogger(str(tmp_path), 1, 2, RANK_0)
    (tmp_path / METRICS).mkdir()
    for number in (1, 2):
        logger.step(number, metrics_with(), 0.5, 1e-4)
        logger.step_is_over()
    logger.close()
    assert capsys.readouterr().err.count("the run goes on without this log") == 1
    assert set(scalars(tmp_path, "loss/all")) == {1, 2}


def test_runs_compare_by_their_hyperparameters(tmp_path):
    logger = StepLogger(str(tmp_path), 1, 1, RANK_0)
    logger.comparable({"selection.method": "sstoken", "selection.rho": 0.6})
    logger.text(0, "1 command", "`python`")
    logger.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    data = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert HParamsPluginData.FromString(data).session_start_info.hparams["selection.method"].string_value == "sstoken"
    data = found.summary_metadata["_hparams_/experiment"].plugin_data.content
    (metric,) = HParamsPluginData.FromString(data).experiment.metric_infos
    assert metric.name.tag == tag_of("loss/validation")
    assert found.Tensors("1 command/text_summary")[0].tensor_proto.string_val == [b"`python`"]
