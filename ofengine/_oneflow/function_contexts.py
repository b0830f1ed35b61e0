"""What a step writes on the context of an ``autograd.Function``, and reads in its backward.

OneFlow 0.9 hands out what was written on a context (``ctx.scale``, and ``ctx.__dict__``) without a
reference of its own, so that Python frees what the context still has, and the process dies later,
elsewhere. ``del ctx.scale`` passes a null pointer on. Here CPython's own functions for attributes,
which most objects have, take the place of OneFlow's.
"""

from __future__ import annotations

import ctypes
import logging

import oneflow as flow

log = logging.getLogger("ofengine")

_GETATTRO, _SETATTRO, _GETSET = 18, 19, 31
"""Where CPython 3.8 to 3.10 has these in a ``PyTypeObject``, in words."""
_GETSET_WORDS = 5
"""Words of a ``PyGetSetDef``: its name, its reader, its writer, its text, its closure."""
_MOST_GETSETS = 10


def mend_function_contexts() -> bool:
    """Let a context of ``autograd.Function`` keep what is written on it; False where it cannot be.

    Other objects are not touched, and a second call changes nothing.
    """
    try:
        context = flow._oneflow_internal.autograd.Function.FunctionCtx
        words, plain = _words(id(context)), _words(id(object))
        reader, writer = map(_address, ("PyObject_GenericGetAttr", "PyObject_GenericSetAttr"))
    except (AttributeError, TypeError):
        log.debug("contexts of autograd.Function are as OneFlow has them: not found", exc_info=True)
        return False
    if (plain[_GETATTRO], plain[_SETATTRO]) != (reader, writer) or not context.__dictoffset__:
        return False  # another Python, which has them elsewhere
    words[_GETATTRO], words[_SETATTRO] = reader, writer
    properties = _words(words[_GETSET])
    for start in range(0, _MOST_GETSETS * _GETSET_WORDS, _GETSET_WORDS):
        if not properties[start]:
            break
        if ctypes.string_at(properties[start]) == b"__dict__":
            properties[start + 1] = _address("PyObject_GenericGetDict")
    return True


def _words(address: int) -> ctypes._Pointer[ctypes.c_uint64]:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64))


def _address(name: str) -> int:
    found = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
    assert found is not None
    return found
