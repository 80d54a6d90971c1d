"""Sixty-four rows at once as the bits of one word, for compiled loops.

The compiler does not find these by itself in a loop. They are written as operations on vectors of 64 values,
which LLVM turns into what the processor has: one or two instructions with AVX-512, a few with AVX2 or NEON.
In a mask, bit j stands for the row `start + j`.
"""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

ROWS = 64
"""Rows of a mask."""


def _rows(context: Any, builder: Any, array_type: Any, array: Any, start: Any) -> tuple[Any, Any]:
    """Where the 64 values from `start` on lie in memory, as a vector, and its type."""
    vector = ir.VectorType(context.get_data_type(array_type.dtype), ROWS)
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer()), vector


def _compare(relation: str) -> Any:
    def typing(_typing_context: Any, array: Any, _start: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place, vector = _rows(context, builder, signature.args[0], *arguments[:2])
            value = arguments[2]
            if value.type != vector.element:
                value = builder.trunc(value, vector.element)
            nothing, index = ir.Constant(vector, ir.Undefined), ir.IntType(32)
            first = builder.insert_element(nothing, value, ir.Constant(index, 0))
            everywhere = ir.Constant(ir.VectorType(index, ROWS), [0] * ROWS)
            wanted = builder.shuffle_vector(first, nothing, everywhere)
            bits = builder.icmp_unsigned(relation, builder.load(place, align=1), wanted)
            return builder.bitcast(bits, ir.IntType(ROWS))

        return types.uint64(array, types.intp, types.uint64), generate

    return intrinsic(typing)


at_most: Any = _compare("<=")
"""at_most(array, start, value): the mask of the unsigned values that are not larger."""

equal: Any = _compare("==")
"""equal(array, start, value): the mask of the values that are the same."""


def _add_typing(_typing_context: Any, array: Any, _start: Any, _mask: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, vector = _rows(context, builder, signature.args[0], *arguments[:2])
        bits = builder.bitcast(arguments[2], ir.VectorType(ir.IntType(1), ROWS))
        values = builder.load(place, align=1)
        builder.store(builder.add(values, builder.zext(bits, vector)), place, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


add: Any = intrinsic(_add_typing)
"""add(array, start, mask): 1 is added to the values whose bit is set."""


def _lowest_typing(_typing_context: Any, _mask: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


lowest: Any = intrinsic(_lowest_typing)
"""lowest(mask): number of the lowest set bit. There must be one."""
