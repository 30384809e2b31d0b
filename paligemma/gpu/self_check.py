"""Each fast implementation ("fast way") is compared once with a plain one ("plain way"), and is not used if the results differ.

Some code for GPUs (CUDA graphs, compiled kernels, operators of torch that few programs use) can be wrong on a card, with a driver
or with a version of torch that has not been tried. For all such code there is also a plain way, which computes the same with
ordinary operators. The first result of the fast way is compared with the plain result. If they differ, or if the fast way raises
an exception, the plain way is used until the process ends, and one line of the log says so. The comparison waits for the device,
so it happens once only.

`all_ways` lists all fast ways with the results of their checks, for `paligemma doctor`.
Checked in tests/gpu/test_self_check.py.
"""

import logging
import math
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WAYS: dict[str, "FastWay"] = {}  # every FastWay of this process, by name


def rounding_bound(dtype: torch.dtype, layers: int = 1) -> float:
    """The largest relative difference (see relative_difference) between two correct ways to compute `layers` layers in `dtype`.

    Correct ways add the same numbers in other orders, and a fused kernel rounds less often than separate operators. The rounding
    errors of the layers are nearly independent, so their sum grows with the square root of the number of layers. The logits of
    the demo's 4 layers in bfloat16 and in float16 differ from those in float32 by 0.4 to 2.3 eps; the bound is 8 eps there, and
    20 eps for 26 layers (0.16 in bfloat16). float32 gets the bound of float16, because a program may allow TF32, which has the
    10 fraction bits of float16. A wrong token, position, slot or scale gives a difference near 1.
    """
    return 4 * max(torch.finfo(dtype).eps, 2**-10) * math.sqrt(layers)


def relative_difference(found: Tensor, expected: Tensor) -> float | None:
    """|found - expected| / |expected|, with the root of the sum of squares as the norm; waits for the device.

    Numbers that are not finite must be the same on both sides (NaN equals NaN) and are otherwise left out: a model that overflows
    does so in both ways.

    Returns: inf if shapes differ, or if a number is not finite on one side only; None if no number can be compared, because all
        are zero or not finite.
    """
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().float(), expected.detach().to(found.device).float()
    is_finite = found.isfinite() & expected.isfinite()
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    if not bool((is_finite | is_same).all()):
        return math.inf
    gap = float((found - expected).masked_fill(~is_finite, 0).norm())
    size = float(expected.masked_fill(~is_finite, 0).norm())
    if size == 0:
        return None if gap == 0 else math.inf
    return gap / size


def device_name(device: torch.device) -> str:
    """The name of the device for a message: "NVIDIA L4", "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class FastWay:
    """A fast way to compute something, which is used until it is found to be wrong or to fail.

    Args:
        name: for messages, in the plural: "recorded steps".
        bound: the largest relative difference from the plain way, usually from rounding_bound. A call of `run` or `check` may
            give another one.
        instead: the end of the log line that says that the way is turned off: what is done instead.
    Attributes:
        reason: why the way was turned off; None if it is on.
    """

    def __init__(self, name: str, bound: float, instead: str = "using plain operators instead"):
        self.name, self.bound, self.instead = name, bound, instead
        self.reason: str | None = None
        self.checked: set[Hashable] = set()
        self.lock = threading.Lock()
        WAYS[name] = self

    @property
    def is_on(self) -> bool:
        return self.reason is None

    @property
    def state(self) -> str:
        """ "unchecked" (not used so far), "on" (used, and equal to the plain way) or "off"."""
        return "off" if not self.is_on else "on" if self.checked else "unchecked"

    def reset(self) -> None:
        """Forgets all checks, for tests and for `paligemma doctor`."""
        self.reason, self.checked = None, set()

    def turn_off(self, reason: str, *, is_fault: bool = False) -> None:
        """Uses the plain way from now on. The first call logs one line; with `is_fault` the line asks the user to report it."""
        with self.lock:
            if not self.is_on:
                return
            self.reason = reason
        report = " Please report the output of `paligemma doctor`." if is_fault else ""
        log.warning("%s %s: %s.%s", self.name, reason, self.instead, report)

    def fail(self, error: Exception) -> None:
        """Turns the way off because of an exception."""
        lines = str(error).strip().splitlines() or [""]
        self.turn_off(f"fail ({type(error).__name__}: {lines[0]})", is_fault=True)

    def is_checked(self, key: Hashable = None) -> bool:
        return key in self.checked

    def check(self, found: Tensor, expected: Tensor, *, key: Hashable = None, bound: float | None = None) -> bool:
        """Whether the fast result `found` is close to the plain result `expected`. If not, the way is turned off."""
        bound = self.bound if bound is None else bound
        try:
            difference = relative_difference(found, expected)
        except RuntimeError as error:  # a kernel failed on the device, which is reported when the CPU waits
            self.fail(error)
            return False
        if difference is None:  # nothing could be compared, so the next result is checked
            return True
        if difference > bound:
            numbers = f"relative difference {difference:.2g}, at most {bound:.2g} was expected"
            self.turn_off(f"differ on {device_name(found.device)} ({numbers})", is_fault=True)
            return False
        self.checked.add(key)
        return True

    def attempt(self, fast: Callable[[], Tensor]) -> Tensor | None:
        """The result of `fast`, which is not compared; None if the fast way is off or fails now. Raises: as `run`."""
        if not self.is_on:
            return None
        try:
            return fast()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  (compilers and drivers raise exceptions of any class)
            self.fail(error)
            return None

    def run(
        self,
        fast: Callable[[], Tensor],
        plain: Callable[[], Tensor],
        *,
        key: Hashable = None,
        bound: float | None = None,
    ) -> Tensor:
        """The result of `fast`, or of `plain` if the fast way is off. The first result for each `key` is checked.

        Args:
            fast, plain: compute the same tensor and change nothing else, because both run during the check.
            key: identifies the kernel that is checked, for example by a shape, if each shape has its own kernel.
            bound: replaces the bound of the way.
        Raises: torch.OutOfMemoryError from `fast`, because the plain way needs more memory; anything that `plain` raises.
        """
        found = self.attempt(fast)
        if found is None:
            return plain()
        if self.is_checked(key):
            return found
        expected = plain()
        return found if self.check(found, expected, key=key, bound=bound) else expected


def all_ways() -> list[dict[str, str | None]]:
    """The name, the state and the reason of every FastWay of this process, for `paligemma doctor`."""
    return [{"name": way.name, "state": way.state, "reason": way.reason} for way in WAYS.values()]


def reset_all() -> None:
    """Forgets all checks of the process, for tests."""
    for way in WAYS.values():
        way.reset()
