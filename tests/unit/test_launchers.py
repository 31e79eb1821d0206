"""Every launcher with every configuration plans its run on a machine without a GPU; what the launchers start, with stubs."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_sstoken import launch, supported
from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.commands.make_config import make_config, make_stand_in_data
from megatron_sstoken.config import SettingsError
from megatron_sstoken.model.presets import MODELS
from megatron_sstoken.validate.describe import describe
from megatron_sstoken.validate.run import plan_run
from tests.helpers import cli

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's own
CONFIGS = cli.ROOT / "pretrain_scripts" / "configs"
ONE = [f"--parallel.{name}=1" for name in ("tensor", "pipeline", "virtual_pipeline", "context")]
NODES = {name: 2 for name in MODELS} | {"Llama-3.1-70B": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The real architectures without weights, and stand-in data."""
    folder = tmp_path_factory.mktemp("launchers")
    for name in MODELS:
        make_config(name, folder / name)
    make_stand_in_data(folder / "data")
    return folder


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    paths = [f"--model.hf_path={folder / name}", f"--data.train={folder / 'data'}"]
    return [*paths, f"--checkpoint.directory={folder / 'run'}", *more]


def plan(folder: Path, name: str, world_size: int, *more: str):
    config = ["--config", str(CONFIGS / f"{name}.yaml")]
    settings, _ = parse_settings([*config, *arguments(folder, name, *more)], program="test", description="")
    return plan_run(settings, world_size, dry_run=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_configuration_plans_on_one_gpu_a_node_and_many(folder, name):
    sizes = [(1, [*ONE, "--parallel.sequence=false"]), (8 * NODES[name], [])]
    sizes += [(8, [])] if name != "Llama-3.1-70B" else []
    for world_size, more in sizes:
        found = plan(folder, name, world_size, *more)
        assert found.world_size == world_size and found.num_steps > 0
        assert [note for note in found.notes if "has neither model.safetensors" in note] == list(found.notes)
    assert (CONFIGS / f"{name}.yaml").is_file() and "note" in describe(found)


def test_fp8_is_a_note_of_a_dry_run_and_an_error_of_a_run(folder):
    fp8 = ["--training.precision=fp8", "--training.fp8_recipe=blockwise"]
    found = plan(folder, "Llama-3.1-8B", 8, *fp8)
    assert any("training.precision=fp8" in note for note in found.notes)
    # Each of the two tensor ranks holds half of a row under sequence parallel, in whole tiles of 128 tokens.
    assert found.shape.pack_multiple == 256
    with pytest.raises(SettingsError, match="training.precision=fp8 .* cannot run: this machine has no CUDA"):
        plan_run(found.settings, 8)
    with pytest.raises(SettingsError, match="needs multiples of 128; model.intermediate_size leaves a rank 1728"):
        plan(folder, "Qwen2.5-14B", 8, *fp8, "--parallel.tensor=8")


def test_what_does_not_fit_a_node_is_said(folder):
    with pytest.raises(SettingsError, match="8 processes cannot be split into parallel.tensor=4 × parallel.pipeline=4"):
        plan(folder, "Llama-3.1-70B", 8)


@pytest.mark.parametrize(
    ("script", "name", "environment", "says"),
    [
        (
            "slurm.sh",
            "Llama-3.1-70B",
            {"NNODES": "16"},
            "128 = tensor 4 × pipeline 4 (× 10 chunks) × context 1 × data 8",
        ),
        ("single_gpu.sh", "Llama-3.1-8B", {}, "1 = tensor 1 × pipeline 1 × context 1 × data 1"),
    ],
)
def test_the_scripts_themselves(folder, script, name, environment, says):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = ["bash", f"pretrain_scripts/{script}", name, *arguments(folder, name), "--dry_run"]
    environment = cli.environment() | {"PATH": path} | environment
    result = subprocess.run(command, env=environment, cwd=cli.ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout and "no weights" not in result.stderr


def test_an_unknown_configuration_lists_those_that_are_there():
    result = subprocess.run(
        ["bash", "pretrain_scripts/node.sh", "GPT-5"], cwd=cli.ROOT, capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 2
    assert "Llama-3.1-70B" in result.stderr and "quickstart" in result.stderr


STUB = """#!/usr/bin/env bash
# Says how it was called.
{{ pwd; printf '%s\\n' "$@"; printf '%s\\n' "NCCL_SOCKET_IFNAME=${{NCCL_SOCKET_IFNAME:-}}"; }} >"{record}"
{body}
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a program before all others: `stub(name, body)` gives the file where it writes down its folder and arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("VENV", "/none")
    for name in (
        "SSTOKEN_ROOT",
        "MAX_RESTARTS",
        "LOGS",
        "GPUS",
        "NNODES",
        "MASTER_PORT",
        "STOPPED_CODE",
        "CLUSTER_ENV",
    ):
        monkeypatch.delenv(name, raising=False)

    def make(name: str, body: str = "") -> Path:
        record = tmp_path / f"{name}.called"
        (programs / name).write_text(STUB.format(record=record, body=body), encoding="utf-8")
        (programs / name).chmod(0o755)
        return record

    return make


def call(folder, *command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *command], cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def script(name: str) -> str:
    return str(cli.ROOT / "pretrain_scripts" / name)


@pytest.mark.parametrize("name", ["single_gpu.sh", "node.sh", "nodes.sh"])
def test_relative_paths_mean_the_folder_of_the_caller(stub, tmp_path, name):
    called = stub("python")
    (tmp_path / "own.yaml").write_text("model: {hf_path: here}\n")
    more = {"NODE_RANK": "0", "MASTER_ADDR": "node0", "MAX_RESTARTS": "4", "LOGS": "logs"}
    result = call(tmp_path, script(name), "own.yaml", "--data.train=data", **more)
    assert result.returncode == 0, result.stderr
    folder, *arguments = called.read_text().splitlines()
    assert folder == str(tmp_path) and "--data.train=data" in arguments
    assert arguments[arguments.index("--config") + 1] == "own.yaml"
    assert {"--max-restarts=4", "--logs=logs", "--need-gpus"} <= set(arguments)


def test_the_settings_of_a_cluster_reach_the_processes(stub, tmp_path):
    called = stub("python")
    settings = tmp_path / "cluster.env"
    settings.write_text('NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}"\n')
    assert call(tmp_path, script("node.sh"), "quickstart", CLUSTER_ENV=str(settings)).returncode == 0
    assert "NCCL_SOCKET_IFNAME=ib0" in called.read_text()
    call(tmp_path, script("node.sh"), "quickstart", CLUSTER_ENV=str(settings), NCCL_SOCKET_IFNAME="eth7")
    assert "NCCL_SOCKET_IFNAME=eth7" in called.read_text(), "the environment of the command wins"
    result = call(tmp_path, script("node.sh"), "quickstart", CLUSTER_ENV="nowhere.env")
    assert result.returncode == 2 and "error: CLUSTER_ENV=nowhere.env is not a file: copy" in result.stderr


def test_the_example_of_cluster_settings_can_be_sourced(tmp_path):
    example = Path(script("cluster.env.example")).read_text()
    (tmp_path / "cluster.env").write_text(
        "".join(line.removeprefix("# ") for line in example.splitlines(True) if '="${' in line)
    )
    result = call(tmp_path, "-euc", "set -a; source ./cluster.env; env")
    assert result.returncode == 0 and "NCCL_IB_HCA=mlx5\n" in result.stdout


@pytest.mark.parametrize("name", ["single_gpu.sh", "node.sh"])
def test_without_gpus_nothing_starts(stub, tmp_path, name):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": path, "SSTOKEN_DEVICE": ""}
    result = call(tmp_path, script(name), "Llama-3.2-1B", **hidden)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and "want a GPU each, and torch finds 0 on" in line


JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_GPUS_ON_NODE": "4"}
SCONTROL = f"""
case "$*" in
    *"show job"*) echo "JobId=4711 JobName=sstoken Command={script("slurm.sh")} Llama WorkDir=/" ;;
    *hostnames*) printf 'node0\\nnode1\\n' ;;
    requeue*) echo requeued ;;
esac
"""


def submitted(folder, **more) -> subprocess.Popen:
    """The batch script as Slurm runs it: a copy from elsewhere, which its own path does not tell."""
    copy = folder / "slurm_script"
    copy.write_text(Path(script("slurm.sh")).read_text())
    return subprocess.Popen(
        ["bash", str(copy), "quickstart", "--data.train=data"],
        cwd=folder, env=os.environ | JOB | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_job_starts_the_launcher_on_each_machine(stub, tmp_path):
    stub("scontrol", SCONTROL)
    ports = []
    for number in ("4711", "4712"):
        body = 'env | grep -E "^(MASTER|NNODES|GPUS|RUN_ID|MAX_RESTARTS|LOGS)"; SLURM_NODEID=1 exec "${@:3}"'
        called, python = stub("srun", body), stub("python")
        output, errors = submitted(tmp_path, SLURM_JOB_ID=number).communicate(timeout=60)
        told = dict(line.split("=", 1) for line in output.splitlines())
        assert told["NNODES"] == "2" and told["GPUS"] == "4" and told["MASTER_ADDR"] == "node0", errors
        assert told["LOGS"] == str(tmp_path / f"sstoken-{number}") and told["MAX_RESTARTS"] == "3"
        ports.append(int(told["MASTER_PORT"]))
        assert {"--kill-on-bad-exit=1", "--cpu-bind=none"} <= set(called.read_text().splitlines())
        folder, *arguments = python.read_text().splitlines()
        assert folder == str(tmp_path) and f"--rdzv-endpoint=node0:{ports[-1]}" in arguments
        assert {"--nproc-per-node=4", "--rdzv-conf=is_host=false", "--stopped-code=0", f"--rdzv-id={number}"} <= set(
            arguments
        )
    assert ports[0] != ports[1] and all(1024 < port < 32768 for port in ports)


def test_a_job_in_a_container(stub, tmp_path):
    stub("scontrol", SCONTROL)
    called = stub("srun")
    submitted(tmp_path, CONTAINER_IMAGE="sstoken.sqsh", CONTAINER_MOUNTS="/shared:/shared").communicate(timeout=60)
    arguments = called.read_text().splitlines()
    assert "--container-image=sstoken.sqsh" in arguments and f"--container-workdir={tmp_path}" in arguments
    (mounts,) = [one for one in arguments if one.startswith("--container-mounts=")]
    assert mounts.endswith(f",{tmp_path}:{tmp_path},/shared:/shared") and f"{cli.ROOT}:{cli.ROOT}" in mounts


def test_a_job_whose_time_is_up_saves_and_queues_again(stub, tmp_path):
    """Slurm's signal reaches the script alone, which tells the steps, waits for them, and asks for another turn."""
    pid, record = tmp_path / "srun.pid", stub("scontrol", SCONTROL)
    stub(
        "srun",
        f'trap "sleep 1; echo saved; exit 0" TERM; echo $$ >"{pid}"; echo training; while true; do sleep 0.1; done',
    )
    told = stub("scancel", f'kill -TERM "$(cat "{pid}")"')
    job = submitted(tmp_path)
    assert job.stdout.readline() == "training\n"
    job.send_signal(signal.SIGUSR1)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert [line for line in output.splitlines() if " " not in line] == ["saved", "requeued"]
    assert told.read_text().splitlines()[1:3] == ["--signal=TERM", "4711"]
    assert record.read_text().splitlines()[1:3] == ["requeue", "4711"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_that_ends_by_itself_is_not_queued_again(stub, tmp_path, code):
    record = stub("scontrol", SCONTROL)
    stub("srun", f"exit {code}")
    job = submitted(tmp_path)
    job.communicate(timeout=60)
    assert job.returncode == code and "requeue" not in record.read_text()


def test_a_job_knows_what_slurm_has_to_do():
    told = [
        line.removeprefix("#SBATCH ") for line in Path(script("slurm.sh")).read_text().splitlines() if "#SBATCH" in line
    ]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append", "--output=sstoken-%j.log"} <= set(told)


@pytest.mark.parametrize("path", sorted((cli.ROOT / "pretrain_scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_example_for_kubernetes_starts_nodes_and_never_repeats_a_mistake():
    spec = yaml.safe_load(Path(script("kubernetes.yaml")).read_text())["spec"]
    (machines,) = spec["replicatedJobs"]
    job = machines["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(given["NNODES"]) == job["parallelism"] == job["completions"] and "NODE_RANK" in given
    assert int(given["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["MASTER_ADDR"].startswith(f"sstoken-{machines['name']}-0-0.")
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes == {"containerName": container["name"], "operator": "In", "values": [launch.MISTAKE]}
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > int(launch.STOP_SECONDS)
    assert container["args"][0] in MODELS and Path(container["command"][1]).name == "nodes.sh"


def test_the_container_installs_what_is_pinned():
    text = Path(script("container/Dockerfile")).read_text()
    (base,) = [line for line in text.splitlines() if line.startswith("FROM ")]
    assert "cuda:13." in base and "-cudnn-devel-ubuntu24.04" in base, (
        "Python 3.12, and the CUDA of torch's wheels on PyPI"
    )
    assert "grep '^torch==' constraints.txt" in text and "--no-build-isolation" in text
    (code,) = re.findall(r"python -c \\\n\s+'(.*?)'", text)
    told = subprocess.run([sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True, text=True)
    assert told.stdout.strip() == supported.LINES[-1].transformer_engine
