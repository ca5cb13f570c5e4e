"""Started by commands.Warm: imports the package once, forks a process for each command.

The child runs `snoopi.train` or `snoopi.generate` as __main__, as `python -m` would, with its own
streams, signals, limits and rights. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
import traceback
from typing import Any

import snoopi.data
import snoopi.generate
import snoopi.train
import snoopi.zoo


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or child(request)
        print(json.dumps(answer), flush=True)


def child(request: dict[str, Any]) -> None:
    streams = [os.open(os.devnull, os.O_RDONLY)]
    streams += [os.open(request[n], os.O_WRONLY | os.O_CREAT, 0o644) for n in ("out", "err")]
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(request["cwd"])
    if request["largest_file"]:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], hard))
    if request["no_rights"]:
        drop_rights()
    module = f"snoopi.{request['module']}"
    del sys.modules[module]
    sys.argv = [module, *request["words"]]
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def drop_rights() -> None:
    """Give up every capability, so that a folder's mode binds root, too (capset(2))."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    snoopi.zoo.build("debug")  # the first network on "meta" imports another second's worth
    serve()
