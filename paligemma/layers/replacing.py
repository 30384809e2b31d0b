"""Replaces a module by one that computes the same in another way: faster on one kind of device, or without overflow.

A replacement is a subclass that overrides a few methods; where it changes only some cases of a method, it calls super() in the
others. So several replacements of one module can be combined: `extended` puts the methods of the newest in front of the others.
"""

import functools
from typing import TypeVar, cast

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@functools.cache
def combined(kind: type, base: type) -> type:
    """A class with the methods of both; those of `kind` come first, and call those of `base` by super()."""
    if issubclass(kind, base):
        return kind
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {"__reduce__": reduced})


def reduced(module: nn.Module) -> tuple:
    """How pickle stores a module of a combined class: as the classes that were combined, because no file defines the result."""
    kinds: list[type] = [type(module)]
    while kinds[-1].__dict__.get("__reduce__") is reduced:
        kinds += kinds.pop().__bases__
    return unfilled, tuple(kinds), module.__dict__


def unfilled(*kinds: type) -> nn.Module:
    """A module of the class that combines these classes, still without attributes, which pickle then restores."""
    combination = functools.reduce(lambda base, kind: combined(kind, base), reversed(kinds))
    return nn.Module.__new__(cast(type[nn.Module], combination))


def extended(module: nn.Module, kind: type[Module]) -> Module:
    """A module with the methods of `kind`, which is a subclass of the original class of `module`.

    Parameters, submodules and settings are shared with `module`.
    """
    if isinstance(module, kind):
        return module
    new = nn.Module.__new__(combined(kind, type(module)))
    nn.Module.__init__(new)  # the __init__ of the plain class would allocate parameters
    new.__dict__.update(module.__dict__)
    return cast(Module, new)
