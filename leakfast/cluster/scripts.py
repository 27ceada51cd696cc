"""Batch scripts that start a Ray cluster on an allocation and a study on it: Slurm (sbatch) and Kubernetes (KubeRay). Demands
a checked study; starts nothing."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.errors import InputError
from leakfast.version import __version__

if TYPE_CHECKING:
    from leakfast.study.config import Study

SCHEDULERS = ("slurm", "kubernetes")
RAY = "2.60.0"  # that the tests run with; constraints-cluster.txt says the same

_SLURM = """\
#!/bin/bash
# {name} on a Ray cluster of this allocation. Other sizes: sbatch --nodes=4 --gpus-per-node=8 --time=12:00:00 SCRIPT.
# The run's folder must lie where every node sees it, or at least the first one, which alone writes it. Submitted again, or
# requeued, it goes on where it was.
#SBATCH --job-name={job}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node={gpus}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={job}-%j.log

set -euo pipefail

export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE="${{HF_HUB_OFFLINE:-1}}"
cd {folder}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
host=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{{ print $1 }}')
# Whoever reaches an open Ray port may run code as you: Ray 2.52 and newer ask for this token, which lives as long as the
# job and stands in no file. Keep the port inside the cluster's own network.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 ray symmetric-run --address "$host:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \\
  --include-dashboard=false -- {command} --cluster "$host:$port"
"""


def script(scheduler: str, study: Study, file: Path, words: Sequence[str] = ()) -> str:
    """What is handed to sbatch, or to kubectl, for `leakfast run FILE WORDS`. Raises InputError for another scheduler."""
    job = re.sub(r"[^a-z0-9-]+", "-", f"leakfast-{study.name}".lower()).strip("-")[:50]
    command = ["leakfast", "run", str(file.resolve()), *words]
    each = study.vllm.tensor_parallel
    if scheduler == "slurm":
        about = {"name": study.name, "job": job, "gpus": each, "folder": shlex.quote(str(Path.cwd()))}
        return _SLURM.format(command=shlex.join(command), **about)
    if scheduler == "kubernetes":
        return _kubernetes(job, file, words, each)
    raise InputError(f"run: --print writes scripts for {' and '.join(SCHEDULERS)}, not for {scheduler}.")


def _kubernetes(job: str, file: Path, words: Sequence[str], gpus: int) -> str:
    """A KubeRay RayJob, as JSON, which kubectl takes as it is: the driver on the head, workers with the GPUs, the study and
    the runs on a volume that is claimed under the job's name."""
    command = [
        "leakfast",
        "run",
        f"/work/{file.name}",
        "--out",
        f"/work/runs/{file.stem}",
        *words,
        "--cluster",
        "auto",
    ]
    image = f"leakfast:{__version__}"
    mounts = [{"name": "work", "mountPath": "/work"}]
    volumes = [{"name": "work", "persistentVolumeClaim": {"claimName": job}}]

    def pod(name: str, resources: dict[str, str]) -> dict[str, object]:
        container = {"name": name, "image": image, "volumeMounts": mounts, "resources": {"limits": resources}}
        return {"spec": {"containers": [container], "volumes": volumes}}

    worker = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": str(gpus)}
    cluster = {
        "rayVersion": RAY,
        "authOptions": {"mode": "token"},  # KubeRay makes the token and gives it to every node
        "headGroupSpec": {
            "rayStartParams": {"num-gpus": "0"},  # with its dashboard: KubeRay hands the job in there
            "template": pod("head", {"cpu": "4", "memory": "16Gi"}),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": 1,
                "minReplicas": 1,
                "maxReplicas": 1,
                "rayStartParams": {},
                "template": pod("worker", worker),
            }
        ],
    }
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job},
        "spec": {
            "entrypoint": shlex.join(command),
            "shutdownAfterJobFinishes": True,
            "backoffLimit": 3,
            "rayClusterSpec": cluster,
        },
    }
    return json.dumps(manifest, indent=2) + "\n"
