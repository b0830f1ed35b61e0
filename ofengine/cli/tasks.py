"""What commands about a task share: the task that FILE.py:Task names, errors as one sentence."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, Callable, List, Tuple, Type

from ofengine.errors import ConfigurationError, OFEngineError, OFEngineWarning
from ofengine.task import TaskModule


def report_errors(command: str, body: Callable[[], int]) -> int:
    """The exit status that ``body`` returns; 1, and a sentence on stderr, where it raises."""

    def show_warning(message: Any, *_: Any, **__: Any) -> None:
        print(f"ofengine {command}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", OFEngineWarning)
            warnings.showwarning = show_warning
            return body()
    except OFEngineError as error:
        print(f"ofengine {command}: {error}", file=sys.stderr)
        return 1


def instance_of(path: Path, cls: Type[TaskModule], given: List[str]) -> TaskModule:
    """``cls()`` of the file ``path``, with what ``--arg KEY=VALUE`` gave.

    Raises:
        ConfigurationError: the arguments do not fit, or the constructor raises.
    """
    task: TaskModule = call(path, f"{cls.__name__}()", lambda: _instance(cls, given))
    return task


def load_task(name: str) -> Tuple[Path, Type[TaskModule]]:
    """The file and the TaskModule subclass that ``FILE.py:Task`` names.

    The file runs as a module, with its own folder on the path and without its
    ``if __name__ == "__main__"``.

    Raises:
        ConfigurationError: there is no such file or class, or the file cannot be run.
    """
    file, colon, wanted = name.rpartition(":")
    if not colon or not file or not wanted:
        raise ConfigurationError(f"{name!r} names no task: write FILE.py:Task.")
    path = Path(file)
    if not path.is_file():
        raise ConfigurationError(f"there is no file {file}: write FILE.py:Task.")
    module = call(path, "it", lambda: _run(path))
    cls = getattr(module, wanted, None)
    if cls is None:
        tasks = [key for key, value in vars(module).items() if _is_task(value)]
        has = f"its tasks are {', '.join(tasks)}" if tasks else "it has no TaskModule"
        raise ConfigurationError(f"{file} has no class {wanted}: {has}.")
    if not _is_task(cls):
        kind = "class" if isinstance(cls, type) else type(cls).__name__
        raise ConfigurationError(
            f"{wanted} of {file} is a {kind} but no TaskModule: name a subclass of "
            "ofengine.TaskModule."
        )
    return path, cls


def _run(path: Path) -> Any:
    # Not under its own name: a file called types.py must not take the place of the real one.
    name = f"ofengine_rates_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path} is no Python file: write FILE.py:Task.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _instance(cls: Type[TaskModule], given: List[str]) -> TaskModule:
    arguments = dict(_key_and_value(each) for each in given)
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        missing = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in arguments
        ]
        if missing:
            options = " ".join(f"--arg {name}=VALUE" for name in missing)
            text = f"{cls.__name__} needs {', '.join(missing)}: add {options}."
        else:
            text = f"{cls.__name__}{signature} does not take these --arg: {error}."
        raise ConfigurationError(text) from None
    return cls(**arguments)


def _key_and_value(text: str) -> Tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigurationError(f"--arg {text}: write --arg NAME=VALUE.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def call(path: Path, what: str, function: Callable[[], Any]) -> Any:
    """``function()``; an error in the user's code becomes one sentence with its line."""
    try:
        return function()
    except OFEngineError:
        raise
    except (Exception, SystemExit) as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path.resolve()
        ]
        line = error.lineno if isinstance(error, SyntaxError) else None
        where = f"{path}, line {frames[-1].lineno if frames else line}"
        place = where if frames or line else str(path)
        text = " ".join(str(error).split()).rstrip(".") or "no text"
        raise ConfigurationError(
            f"{place}: {what} raised {type(error).__name__}: {text}."
        ) from error


def _is_task(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, TaskModule) and value is not TaskModule
