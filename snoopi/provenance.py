"""Where figures come from: machine and commit, nothing that names a host or a path."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import snoopi


def machine(threads: int) -> dict[str, Any]:
    """Where figures come from; nothing that names a host."""
    return {
        "processor": processor(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
    }


@functools.cache
def commit() -> str:
    """The commit of this checkout, with "+" if the package differs from it; else the version."""
    folder = Path(snoopi.__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return f"version {snoopi.__version__}"
    return head + ("+" if git("status", "--porcelain", "--", ".") else "")


def processor() -> str:
    """The processor's name; on Linux its model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
