"""Processes that start as a new interpreter would, but have imported the large libraries already.

They are forked from one that imports these libraries once: a second instead of five for each. Where the order of
imports is what is tested, or what a library says while it is imported, only a new interpreter will do.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120  # after which a process is ended
# Reads requests, forks, and reports how the process ended. The process leaves the loop and runs its code as a module
# `__main__` to the end of the interpreter, so that its exit code and traceback are those of any script.
SERVER = """
import gc as _gc, json as _json, os as _os, signal as _signal, sys as _sys
{imports}
_gc.collect()
_gc.freeze()
for _line in _sys.stdin:
    _request = _json.loads(_line)
    _child = _os.fork()
    if _child == 0:
        break
    print(_os.waitstatus_to_exitcode(_os.waitpid(_child, 0)[1]), flush=True)
else:
    _os._exit(0)
_signal.alarm({seconds})
_os.chdir(_request["folder"])
_os.environ.clear()
_os.environ.update(_request["environment"])
for _stream, _file in enumerate([_os.devnull, _request["out"], _request["err"]]):
    _flags = _os.O_RDONLY if _stream == 0 else _os.O_WRONLY | _os.O_CREAT | _os.O_APPEND
    _os.dup2(_os.open(_file, _flags, 0o666), _stream)
_sys.argv[1:] = _request["arguments"]
exec(compile(_request["before"] + _request["code"], "<string>", "exec"), {{"__name__": "__main__"}})
"""
# Where bolaco is not installed: nothing of it is imported.
OTHERS = """
import sys, torch
import safetensors.torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import generation
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
assert not [name for name in sys.modules if name == "bolaco" or name.startswith("bolaco.")]
"""
# In every process: the folder for code that checkpoints carry, which transformers decides when it is imported.
MODULES = """
import transformers.dynamic_module_utils as _dynamic
_dynamic.HF_MODULES_CACHE = __import__("os").environ["HF_MODULES_CACHE"]
"""
OURS = """
import datasets
import bolaco.allocate.search.run
import bolaco.api
import bolaco.comparison
import bolaco.tune.run
from bolaco.cli import main
"""
# Runs the command line until a moment, then kills itself, with no handler and no clean-up.
KILLED = """
import functools, json, os, pkgutil, signal, sys
from bolaco.cli import main

where, call, moment, words = json.loads(sys.argv[1])
when, _, suffix = moment.partition(" ")
owner, name = pkgutil.resolve_name(where.rpartition(".")[0]), where.rpartition(".")[2]
function, calls = getattr(owner, name), []

@functools.wraps(function)
def killing(*args, **kwargs):
    calls.append(args)
    last = str(args[-1]).endswith(suffix) if suffix else len(calls) == call
    if last and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = function(*args, **kwargs)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, killing)
os._exit(main(words))
"""
Done = subprocess.CompletedProcess[str]


@dataclass
class Server:
    """The process that the others are forked from."""

    process: subprocess.Popen[str]
    folder: Path

    def run(
        self, code: str, folder: Path, environment: dict[str, str], arguments: Sequence[object], before: str = ""
    ) -> Done:
        """Runs code in a folder; what it prints is kept apart."""
        streams = [self.folder / name for name in ("out", "err")]
        for stream in streams:
            stream.unlink(missing_ok=True)
        request = {
            "code": code,
            "before": before,
            "folder": str(folder),
            "environment": environment,
            "arguments": [str(argument) for argument in arguments],
            "out": str(streams[0]),
            "err": str(streams[1]),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code_of_exit = int(self.process.stdout.readline())
        out, err = (stream.read_text(encoding="utf-8") if stream.exists() else "" for stream in streams)
        return subprocess.CompletedProcess([], code_of_exit, out, err)

    def run_alone(self, code: str, folder: Path, *arguments: object) -> Done:
        """Runs code in a folder with the environment of this process, and one thread."""
        return self.run(code, folder, dict(os.environ) | {"OMP_NUM_THREADS": "1"}, arguments)


def environment_of(home: Path) -> dict[str, str]:
    """Without settings of Python and of the hub, with empty caches in ``home`` and without a network."""
    prefixes = ("HF_", "PYTHON", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    places = {"HF_HOME": str(home / "home"), "HF_MODULES_CACHE": str(home / "modules")}
    return kept | places | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _start(imports: str, environment: Callable[[Path], dict[str, str]]) -> Server:
    folder = Path(tempfile.mkdtemp(prefix="bolaco-processes-"))
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(imports=imports, seconds=SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=folder,
        env=environment(folder),
    )

    def end() -> None:
        process.communicate("")
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return Server(process, folder)


@functools.cache
def _others() -> Server:
    return _start(OTHERS, environment_of)


@functools.cache
def ours(number: int = 0) -> Server:
    """Where bolaco is imported already; processes of two numbers run at the same time."""
    return _start(OURS, lambda _: os.environ | {"OMP_NUM_THREADS": "1"})


def without_bolaco(code: str, folder: Path, *arguments: Path) -> Done:
    """Runs code as in a new interpreter that has imported transformers only, away from the project.

    The caches are empty, there is no network, and nothing of bolaco is imported yet; it can be, unless the code sees
    to it.
    """
    return _others().run(code, folder, environment_of(folder), arguments, MODULES)


def with_bolaco(code: str, *arguments: object) -> Done:
    """Runs code in the current folder as in a new interpreter that has imported bolaco."""
    return ours(0).run_alone(code, Path.cwd(), *arguments)


def killed(where: str, call: int, moment: str, words: Sequence[str]) -> Done:
    """Runs the command line in the current folder until it kills itself.

    Args:
        where: the full name of a function or method.
        call: in which call of it.
        moment: "before" or "after" it does its work; with a word more, in the call whose last argument ends so.
        words: of the command line.
    """
    return with_bolaco(KILLED, json.dumps([where, call, moment, list(words)]))
