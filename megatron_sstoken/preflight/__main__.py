"""The program: join the others, look, judge, tell."""

import argparse
import datetime
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist

from megatron_sstoken import preflight
from megatron_sstoken.device import compute_device, have_cuda
from megatron_sstoken.preflight.findings import PATIENCE, describe, judge
from megatron_sstoken.preflight.measure import look


def join() -> None:
    """Meet the other processes, started by torchrun or by srun alone; without either, be the only one."""
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        environment.update(RANK=environment["SLURM_PROCID"], WORLD_SIZE=environment["SLURM_NTASKS"])
        environment.setdefault("LOCAL_RANK", environment["SLURM_LOCALID"])
        environment.setdefault("MASTER_ADDR", hosts.stdout.split()[0])
        environment.setdefault("MASTER_PORT", str(10000 + int(environment["SLURM_JOB_ID"]) % 20000))
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if have_cuda():
        torch.cuda.set_device(compute_device())
        environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = (
            "0"  # what hangs is told here, and must not end the process before
        )
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10 * PATIENCE))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code on all processes: 0 a run can start, 2 it would fail."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sstoken.preflight", description=preflight.__doc__)
    parser.add_argument("--folder", default=".", help="where checkpoints are to go: it has to be shared, and have room")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        join()
    except RuntimeError as error:
        print(
            f"error: process {os.environ['RANK']} on {socket.gethostname()} does not meet the others over gloo "
            f"({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME to the interface that all machines reach each other by",
            file=sys.stderr,
        )
        return 2
    facts, hung = look(options.folder)
    findings = judge(facts, options.folder)
    if dist.get_rank() == 0:
        if options.json:
            print(
                json.dumps(
                    {"facts": [asdict(one) for one in facts], "findings": [asdict(one) for one in findings]}, indent=2
                )
            )
        else:
            print(describe(facts, findings, options.folder))
        sys.stdout.flush()
    code = 2 if any(finding.kind == "error" for finding in findings) else 0
    dist.barrier()
    if hung:  # NCCL would be waited for
        os._exit(code)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
