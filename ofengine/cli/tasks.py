"""What commands about a task share: the task that FILE.py:Task names, errors as one sentence."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, Callable, List, Tuple, Type

import ofengine._oneflow  # noqa: F401 first, for it imports OneFlow quietly
from ofengine.errors import ConfigurationError, OFEngineError, OFEngineWarning
from ofengine.task import TaskModule


def report_errors(command: str, body: Callable[[], int], failed: int = 1) -> int:
    """The exit status that ``body`` returns; ``failed``, and a sentence, where it raises."""

    def show_warning(message: Any, *_: Any, **__: Any) -> None:
        print(f"ofengine {command}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", OFEngineWarning)
            warnings.showwarning = show_warning
            return body()
    except OFEngineError as error:
        print(f"ofengine {command}: {error}", file=sys.stderr)
        return failed


def instance_of(path: Path, cls: Type[TaskModule], given: List[str]) -> TaskModule:
    """``cls()`` of the file ``path``, with what ``--arg KEY=VALUE`` gave.

    Raises:
        ConfigurationError: the arguments do not fit, or the constructor raises.
    """
    task: TaskModule = call(path, f"{cls.__name__}()", lambda: _instance(cls, given))
    return task


def load_task(name: str) -> Tuple[Path, Type[TaskModule]]:
    """The file and the TaskModule subclass that ``FILE.py:Task`` or ``package.module:Task`` names.

    Raises:
        ConfigurationError: there is no such file or class, or the file cannot be run.
    """
    return load_class(name, TaskModule, "task", "Task")


def load_class(name: str, kind: Type[Any], called: str, example: str) -> Tuple[Path, Type[Any]]:
    """The file and the subclass of ``kind`` that ``FILE.py:Name`` or ``package.module:Name`` names.

    A file runs as a module, with its own folder on the path and without its
    ``if __name__ == "__main__"``; once, however many of its classes are asked for. A module is
    looked for in the current folder too.

    Args:
        name: what the user gave.
        kind: what the class is to be a subclass of.
        called: what such a class is called in a sentence.
        example: and in the example of one.

    Raises:
        ConfigurationError: there is no such file or class, or the file cannot be run.
    """
    mend = f"write FILE.py:{example} or package.module:{example}."
    file, colon, wanted = name.rpartition(":")
    if not colon or not file or not wanted:
        raise ConfigurationError(f"{name!r} names no {called}: {mend}")
    path, module = _module(file, mend)
    cls = getattr(module, wanted, None)
    if cls is None:
        classes = [key for key, value in vars(module).items() if _is_a(value, kind)]
        has = f"its {called}s are {', '.join(classes)}"
        if not classes:
            has = f"it has no {kind.__name__}"
        raise ConfigurationError(f"{file} has no class {wanted}: {has}.")
    if not _is_a(cls, kind):
        what = "class" if isinstance(cls, type) else type(cls).__name__
        raise ConfigurationError(
            f"{wanted} of {file} is a {what} but no {kind.__name__}: name a subclass of "
            f"ofengine.{kind.__name__}."
        )
    return path, cls


def _module(file: str, mend: str) -> Tuple[Path, Any]:
    path = Path(file)
    if path.suffix == ".py" or path.is_file() or not _is_dotted(file):
        if not path.is_file():
            raise ConfigurationError(f"there is no file {file}: {mend}")
        return path, call(path, "it", lambda: module_of(path))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = call(Path(file), "it", lambda: _find(file))
    if found is None:
        raise ConfigurationError(f"there is no module {file}: {mend}")
    path = Path(found.origin or file)
    return path, call(path, "it", lambda: importlib.import_module(file))


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:  # a package above it is missing, or what that imports
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return None


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def module_of(path: Path) -> Any:
    """The file as a module; it runs when it is asked for first."""
    file = path.resolve()
    # Not under its own name: a file called types.py must not take the place of the real one.
    name = plain = f"ofengine_file_{path.stem}"
    for number in itertools.count(2):
        if name not in sys.modules:
            break
        if getattr(sys.modules[name], "__file__", None) == str(file):
            return sys.modules[name]
        name = f"{plain}_{number}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path} is no Python file: write FILE.py:Task.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _instance(cls: Type[TaskModule], given: List[str]) -> TaskModule:
    arguments = dict(key_and_value(each) for each in given)
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


def key_and_value(text: str) -> Tuple[str, Any]:
    """What ``--arg KEY=VALUE`` gives.

    Raises :class:`ConfigurationError` where it is not of this form.
    """
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


def _is_a(value: Any, kind: Type[Any]) -> bool:
    return isinstance(value, type) and issubclass(value, kind) and value is not kind
