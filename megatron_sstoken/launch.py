"""Start the processes of a run on this machine: torchrun, with endings that people can read.

`python -m megatron_sstoken.launch --standalone --nproc-per-node 8 -m megatron_sstoken.train --config FILE.yaml` takes
torchrun's options and starts processes as torchrun does. What differs is how it ends: a mistake in what the user gave (exit
code 2 of a process) is never tried again by `--max-restarts`, stands there in its own lines, and is the exit code here, too; a
process that a signal killed is named in one line; stopped by a signal, it waits for the checkpoint and returns 128 + the
signal's number, or `--stopped-code`.
"""

import argparse
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping

import torch
import torch.distributed.launcher.api as launcher
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

MISTAKE = 2
"""Exit code of a process that ends because of what the user gave."""
STOP_SECONDS = "180"
"""What a run that is asked to stop has for its step and its checkpoint, before it is killed; torch's own is 30."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Passed on to the processes, which stop after their step. torch's own list lacks SIGUSR1, which Slurm's users send."""
_WITH_LOG = r"""
log="$SSTOKEN_LOGS/rank_$(printf %05d "$RANK").log"
printf '\n== %s on %s\n' "$(date --iso-8601=seconds)" "$(hostname)" >>"$log"
exec "$@" > >(trap '' INT TERM HUP QUIT USR1; exec tee -a "$log") 2> >(trap '' INT TERM HUP QUIT USR1; exec tee -a "$log" >&2)
"""
"""Starts one process whose output also goes to a file of its own; `tee` ends with the process, not with its signals."""


class _Agent(LocalElasticAgent):
    """torch's agent, which does not start anew what a user has to mend, and says what it does."""

    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            for line in deaths(result.failures):
                _say(line)
            if MISTAKE in (failure.exitcode for failure in result.failures.values()):
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                most = worker_group.spec.max_restarts
                number = most - self._remaining_restarts + 1
                _say(
                    f"note: starting the processes of {socket.gethostname()} again: restart {number} of at most {most}"
                )
        return result


def deaths(failures: Mapping[int, ProcessFailure]) -> list[str]:
    """A line for each process that a signal ended; the others have said themselves why they end."""
    lines = []
    for rank, failure in sorted(_causes(failures).items()):
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            why = ": out of memory, perhaps (dmesg and the job's memory limit tell)" if name == "SIGKILL" else ""
            lines.append(f"error: process {rank} on {socket.gethostname()} was ended by {name}{why}")
    return lines


def exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """What to return for processes that failed: a mistake before anything else, then the first failure's, as a shell would."""
    codes = [failure.exitcode for failure in sorted(_causes(failures).values(), key=lambda one: one.timestamp)]
    first = MISTAKE if MISTAKE in codes else codes[0]
    return first if first > 0 else 128 - first


def _causes(failures: Mapping[int, ProcessFailure]) -> Mapping[int, ProcessFailure]:
    """Without those that the agent ended by SIGTERM because of another one."""
    causes = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    return causes or failures


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: that of the process which failed first, 2 if any made it that."""
    parser = torchrun.get_args_parser()
    parser.add_argument("--need-gpus", action="store_true", help="refuse to start without a GPU for each process")
    parser.add_argument(
        "--logs", metavar="FOLDER", help="append the output of each process to FOLDER/rank_NUMBER.log, too"
    )
    parser.add_argument("--stopped-code", type=int, help="exit code after a signal (default: 128 + its number)")
    if parser.get_default("signals_to_handle") is not None:  # torch 2.9 and later
        parser.set_defaults(signals_to_handle=SIGNALS)
    options = parser.parse_args(arguments)
    if options.need_gpus and (problem := gpu_problem(torchrun.determine_local_world_size(options.nproc_per_node))):
        _say(f"error: {problem}")
        return MISTAKE
    _set_environment()
    if options.nproc_per_node != "1":  # torchrun's own value, without its lines about it
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "LOGLEVEL" not in os.environ:  # torch's own variable: the agent tells of every signal and exit code
        _silence("torch.distributed.elastic")
    if options.logs is not None:
        _log_each_process(options)
    launcher.LocalElasticAgent = _Agent  # type: ignore[misc]  # launch_agent has no argument for it
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        return exit_code(error.failures)
    except SignalException as error:
        _say(f"stopped by {error.sigval.name}")
        return 128 + error.sigval if options.stopped_code is None else options.stopped_code
    except (RendezvousError, torch.distributed.DistNetworkError) as error:
        if (port := _port(options)) is not None and _is_in_use(port):
            _say(
                f"error: port {port} of {socket.gethostname()} is in use, by another run perhaps: set MASTER_PORT (of the "
                "launchers), --master-port or --rdzv-endpoint to another one, the same on every machine"
            )
            return MISTAKE
        if not isinstance(error, RendezvousError):
            raise
        _say(
            f"error: {socket.gethostname()} did not meet the other machines at {options.rdzv_endpoint} "
            f"({type(error).__name__}: {error}): start the same line on every machine, with an address and a port of machine 0 "
            "that all of them reach"
        )
        return 1
    return 0


def _port(options: argparse.Namespace) -> int | None:
    """The port that this machine listens on for the others; None where another machine does, or torch chooses one."""
    if options.standalone:
        return None
    if options.rdzv_backend == "static":
        return options.master_port if options.node_rank == 0 else None
    port = options.rdzv_endpoint.rpartition(":")[2]
    is_host = "is_host=true" in options.rdzv_conf.replace(" ", "").lower() or options.nnodes == "1"
    return int(port) if is_host and port.isdigit() else None


def _is_in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what waits for its end only is free, as for torch
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def gpu_problem(processes: int) -> str | None:
    """Why `processes` processes have no GPU each; None if they have, or if SSTOKEN_DEVICE=cpu says that they need none."""
    if os.environ.get("SSTOKEN_DEVICE") == "cpu":
        return None
    found = torch.cuda.device_count()
    if found >= processes:
        return None
    why = "" if torch.version.cuda else f": torch {torch.__version__} is a build for CPUs"
    return (
        f"{processes} processes want a GPU each, and torch finds {found} on {socket.gethostname()}{why}: set GPUS to what "
        "there is, ask `python -m megatron_sstoken.doctor`, or set SSTOKEN_DEVICE=cpu to train on processors"
    )


def _set_environment() -> None:
    """What the processes inherit, unless the user has set it."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_SECONDS)
    # Packs differ in length from step to step: segments that grow keep the allocator's memory from falling to pieces.
    # torch 2.9 renamed the variable, and reads either.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        is_renamed = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
        os.environ["PYTORCH_ALLOC_CONF" if is_renamed else "PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _log_each_process(options: argparse.Namespace) -> None:
    """Have every process started by a shell that appends its output to `options.logs`, too."""
    folder = os.path.abspath(options.logs)
    os.makedirs(folder, exist_ok=True)
    os.environ["SSTOKEN_LOGS"] = folder
    # Where NCCL's last operations are written down when a run stands still.
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", os.path.join(folder, "flight_recorder_"))
    program = [sys.executable, "-u", *(["-m"] if options.module else []), options.training_script]
    if options.no_python:
        program = [options.training_script]
    options.training_script, options.no_python, options.module = "bash", True, False
    options.training_script_args = ["-c", _WITH_LOG, "rank", *program, *options.training_script_args]


def _silence(prefix: str) -> None:
    """Keep loggers below their errors, those that have a level of their own included."""
    for name in [prefix, *logging.root.manager.loggerDict]:
        if name.startswith(prefix):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
