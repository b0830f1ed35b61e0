"""What a step writes on the context of an ``autograd.Function``, and reads in its backward.

OneFlow 0.9 hands out what was written on a context (``ctx.scale``, and ``ctx.__dict__``) without a
reference of its own, so that Python frees what the context still has, and the process dies later,
elsewhere. ``del ctx.scale`` passes a null pointer on. Here CPython's own functions for attributes,
which most objects have, take the place of OneFlow's.
"""

from __future__ import annotations

import ctypes

import oneflow as flow

from ofengine._oneflow.library import address_of

_GETATTRO, _SETATTRO, _GETSET = 18, 19, 31
"""Where CPython 3.8 to 3.10 has these in a ``PyTypeObject``, in words."""
_GETSET_WORDS = 5
"""Words of a ``PyGetSetDef``: its name, its reader, its writer, its text, its closure."""


def mend_function_contexts() -> bool:
    """Let a context of ``autograd.Function`` keep what is written on it; False where it cannot be.

    Other objects are not touched, and a second call changes nothing.
    """
    names = (f"PyObject_Generic{each}" for each in ("GetAttr", "SetAttr", "GetDict"))
    try:
        context = flow._oneflow_internal.autograd.Function.FunctionCtx
        reader, writer, of_dict = (address_of(ctypes.pythonapi, name) for name in names)
    except (AttributeError, ValueError):
        return False
    words, plain = _words(id(context)), _words(id(object))
    if (plain[_GETATTRO], plain[_SETATTRO]) != (reader, writer) or not context.__dictoffset__:
        return False  # another Python, which has them elsewhere
    words[_GETATTRO], words[_SETATTRO] = reader, writer
    properties, at = _words(words[_GETSET]), 0
    while properties[at]:
        if ctypes.string_at(properties[at]) == b"__dict__":
            properties[at + 1] = of_dict
        at += _GETSET_WORDS
    return True


def _words(address: int) -> ctypes._Pointer[ctypes.c_uint64]:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64))
