"""A kernel over tiles as OpenMP's threads run it: compiled whole, so that no thread needs Python's lock.

A Python callback would have each thread wait for the interpreter's lock before its share, some 50 us a call
on two cores. Here the loop that takes pieces is compiled beside the kernel, as a plain C function

    body(data):  while (i = data.next++) < data.pieces:  kernel(*data.arguments, data.tiles, first_i, last_i)

and is what ``GOMP_parallel`` calls in every thread.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_COUNT = ir.IntType(64)


@intrinsic  # type: ignore[untyped-decorator]
def share(
    typingctx: Any, kernel: Any, arguments: Any, tiles: Any, pieces: Any, threads: Any, parallel: Any
) -> Any:
    """Run ``kernel(*arguments, tiles, first, last)`` over all ``tiles``, in ``pieces``, by ``threads``.

    ``parallel`` is the address of ``GOMP_parallel(body, data, threads, flags)``. Returns how many pieces
    failed; a failed piece tells no more.
    """
    given = (*arguments.types, tiles, types.int64, types.int64)
    signature = kernel.get_call_type(typingctx, given, {})

    def generate(context: Any, builder: Any, own: Any, values: Any) -> Any:
        _, arguments, tiles, pieces, threads, parallel = values
        compiled = kernel.dispatcher.overloads[signature.args]
        context.add_linking_libs([compiled.library])
        record = ir.LiteralStructType([arguments.type, tiles.type, _COUNT, _COUNT, _COUNT])
        data = cgutils.alloca_once(builder, record)
        for place, value in enumerate((arguments, tiles, pieces, _COUNT(0), _COUNT(0))):
            builder.store(value, cgutils.gep_inbounds(builder, data, 0, place))
        body = _body(context, builder.module, record, compiled.fndesc, own.args, signature)
        entry = ir.FunctionType(ir.VoidType(), [body.type, cgutils.voidptr_t, ir.IntType(32), ir.IntType(32)])
        builder.call(
            builder.inttoptr(parallel, entry.as_pointer()),
            [body, builder.bitcast(data, cgutils.voidptr_t), builder.trunc(threads, ir.IntType(32)),
             ir.IntType(32)(0)],
        )  # fmt: skip
        return builder.load(cgutils.gep_inbounds(builder, data, 0, 4))

    whole = types.int64
    return types.int64(kernel, arguments, tiles, whole, whole, whole), generate


def _body(context: Any, module: Any, record: Any, kernel: Any, given: Any, signature: Any) -> Any:
    """The C function that takes pieces until there are no more."""
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
    body = ir.Function(module, kind, module.get_unique_name(f"{kernel.llvm_func_name}.body"))
    body.linkage = "internal"
    begin, ask, take, done = (body.append_basic_block(name) for name in ("begin", "ask", "take", "done"))
    builder = ir.IRBuilder(begin)
    data = builder.bitcast(body.args[0], record.as_pointer())
    arguments, tiles, pieces = (
        builder.load(cgutils.gep_inbounds(builder, data, 0, place)) for place in range(3)
    )
    following, failed = (cgutils.gep_inbounds(builder, data, 0, place) for place in (3, 4))
    unpacked = cgutils.unpack_tuple(builder, arguments)
    count = cgutils.unpack_tuple(builder, context.make_array(given[2])(context, builder, tiles).shape)[0]
    builder.branch(ask)
    builder.position_at_end(ask)
    piece = builder.atomic_rmw("add", following, _COUNT(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", piece, pieces), take, done)
    builder.position_at_end(take)
    first = builder.sdiv(builder.mul(count, piece), pieces)
    last = builder.sdiv(builder.mul(count, builder.add(piece, _COUNT(1))), pieces)
    status, _ = context.call_internal_no_propagate(
        builder, kernel, signature, [*unpacked, tiles, first, last]
    )
    with cgutils.if_unlikely(builder, status.is_error):
        builder.atomic_rmw("add", failed, _COUNT(1), "monotonic")
    builder.branch(ask)
    builder.position_at_end(done)
    builder.ret_void()
    return body
