"""Where a figure was measured: date, commit, versions, processor and its load."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import hla

from .kernels.numpy.threads import cores

PACKAGES = (
    *("numpy", "torch", "triton", "fla-core", "jax", "cupy-cuda13x", "cupy-cuda12x"),
    *("numba", "numba-cuda", "array-api-compat"),
)
# of the environment, that change how fast a library is
SETTINGS = "XLA_FLAGS", "CUDA_LAUNCH_BLOCKING", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"


def describe(commit: str | None = None) -> dict[str, Any]:
    """Date, commit, settings, versions and machine, so that a figure never stands alone.

    Parameters
    ----------
    commit : str, optional
        The commit to report where hla is not in a git checkout.

    Returns
    -------
    dict
    """
    versions = {"python": platform.python_version(), "hla": hla.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": _threads(),
    }
    settings = {name: os.environ[name] for name in SETTINGS if os.environ.get(name, "").strip()}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"date": now, "commit": commit or _commit(), "settings": settings}
    return about | {"versions": versions, "machine": machine}


def source(program: str, result: dict[str, Any]) -> str:
    """Which result a plot shows, as the plot's file says it."""
    return f"hla {program}, {result['date']}, commit {result['commit'] or 'unknown'}"


def accelerators() -> list[str]:
    """Names of the devices that torch sees, where it is installed."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _threads() -> list[dict[str, Any]]:
    """Thread pools of the loaded libraries, where threadpoolctl is installed."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return []
    import threadpoolctl

    keys = ("internal_api", "version", "num_threads")
    return [{key: pool.get(key) for key in keys} for pool in threadpoolctl.threadpool_info()]


def _commit() -> str | None:
    """Commit of the checkout that holds this file, with "-dirty" where it was changed."""
    place = str(Path(__file__).parent)
    try:
        for command in (
            ["git", "-C", place, "ls-files", "--error-unmatch", "__init__.py"],
            ["git", "-C", place, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
