"""The command line: words to a command of :mod:`bolaco.commands`, and its errors to one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bolaco.commands.compare import compare_command
from bolaco.commands.compress import compress_command
from bolaco.commands.delta import delta_command
from bolaco.commands.distill import distill_command, generate_text_command
from bolaco.commands.export import export_command
from bolaco.commands.measure import bench_command, eval_command
from bolaco.commands.show import completion_command, inspect_command, methods_command
from bolaco.commands.tune import tune_command
from bolaco.errors import BolacoError, RankError, no_memory, no_space
from bolaco.parallel.launch import launched, launched_as
from bolaco.parser import command_parser
from bolaco.progress import plain_console


class _Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): it does so as after Ctrl-C, which libraries know."""


@contextmanager
def _asked_to_end() -> Iterator[None]:
    """Raises :class:`_Terminated` where SIGTERM comes; a second one ends the process at once."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What is kept in a work folder, so that the same command goes on.
_RESUMED = ("compress", "compare", "run", "tune", "generate-text", "distill", "delta")
# What several processes of torchrun do together.
_SHARED = ("compress", "run", "compare", "tune")
_COMMANDS = {
    "compress": compress_command,
    "compare": compare_command,
    "run": compress_command,
    "eval": eval_command,
    "tune": tune_command,
    "generate-text": generate_text_command,
    "distill": distill_command,
    "bench": bench_command,
    "inspect": inspect_command,
    "export": export_command,
    "delta": delta_command,
    "methods": methods_command,
    "completion": completion_command,
}


def _known_to_all(error: BolacoError) -> bool:
    """Whether the first process says this too."""
    from bolaco.parallel.team import failed_on_all

    return failed_on_all(error) or not isinstance(error, RankError)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 or 143 when interrupted."""
    # Libraries draw their own bars on import; a run shows one set only.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Of several processes, the first one speaks; another only of what went wrong with it alone.
    console = plain_console(soft_wrap=True, quiet=launched_as() > 0)
    errors = plain_console(soft_wrap=True, stderr=True)
    goes_on = ""
    try:
        with _asked_to_end():
            args = command_parser().parse_args(argv)
            if launched() > 1 and args.command not in _SHARED:
                raise RankError(f"{args.command} is done by one process; start it without torchrun")
            if args.command in _RESUMED:
                goes_on = "; the same command continues where this one was"
            _COMMANDS[args.command](args, console)
    except BolacoError as error:
        if launched_as() and _known_to_all(error):
            return 1
        errors.print(f"bolaco: error: {' '.join(str(error).splitlines())}")
        return 1
    except KeyboardInterrupt as stop:
        errors.print(f"bolaco: stopped{goes_on}")
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except Exception as error:
        if no_space(error):
            errors.print("bolaco: error: no space left on the disk; free some and give the same command again")
            return 1
        if no_memory(error):
            errors.print(
                "bolaco: error: not enough memory; the same command continues where this one was, and takes less with "
                "--set calibration.batch=1, --set calibration.cache=disk or a shorter --seq-len"
            )
            return 1
        if isinstance(error, OSError) and error.filename is not None:
            errors.print(f"bolaco: error: {error.filename}: {error.strerror}")
            return 1
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
