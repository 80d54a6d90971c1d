"""How loops over codes are compiled, and the count of ones, for the metrics and for search."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function as machine code: made at its first call, kept on disk where possible, run without the GIL.

    What it calls is compiled into it. Numba looks only at the function's own file when it decides whether
    the copy on disk is fresh, so compiled functions call others of their own file (and intrinsics) only.
    """
    return _compile(function)


def compiled_in_any_order(function: Function) -> Function:
    """As `compiled`, but sums of floats may be formed in any order, and products with them fused.

    That lets the compiler vectorise sums. The result differs between machines in its last bits.
    """
    return _compile(function, fastmath={"reassoc", "contract"})


def _compile(function: Function, **options: Any) -> Function:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # No folder for the cache can be written to: compile in every process instead.
        return cast(Function, numba.njit(**options)(function))


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array [...] contiguous, aligned and read-only, whatever the caller's was; a view where it can be.

    To the compiler, arrays that can and cannot be written to are different types. Memory-mapped and shared
    arrays cannot, so that every array is passed as they are and each kernel is compiled once.
    """
    view: npt.NDArray[Any] = np.require(array, requirements=["C", "A"]).view(np.ndarray)
    view.flags.writeable = False
    return view


def _ones_typing(_typing_context: Any, word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return word(word), generate


ones: Any = intrinsic(_ones_typing)
"""The number of ones in an unsigned word: one processor instruction, which the compiler can vectorise."""
