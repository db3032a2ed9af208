"""`userip`: the main job and its tools on the command line.

Read in this order: `options` (every flag, written once), `log` (the log that flags name), `shell`
(what ends a command, as a message and an exit code), then a file per group of commands: `learn`
(demo, fit, infer, profiles), `judge` (ctr, tune, explain, report, show), `machine` (lm, doctor,
env) and `banks` (userip bank ...).

Exit codes: 0 done; 1 `doctor` found a failure; 2 wrong use, bad input or bad configuration, or a
disk that cannot be written to, told in one message; 70 a bug, with a traceback and how to report
it, which nothing else shows; 130 interrupted (SIGINT or SIGTERM): the block of users at hand was
finished and kept, nothing is half-written.
"""

from userip_fast.cli.shell import app, main

# They add their commands to `app`, in the order of `--help`.
from userip_fast.cli import learn, judge, machine, banks  # isort: skip

__all__ = ["app", "banks", "judge", "learn", "machine", "main"]
