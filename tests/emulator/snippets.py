"""Build and run hand-written PTX snippets: what the semantics tests share."""

import struct

import numpy as np
import torch

from nmoe.codegen.emulator import Device, Options, Report, ptx

HEAD = ".version 8.8\n.target {target}\n.address_size 64\n"


def module(
    body: str, params: int, declarations: str = "", outer: str = "", target: str = "sm_100a"
) -> ptx.Module:
    """An entry `k` with `params` pointers, loaded to %rd0.., and plenty of registers; %r0 is the thread index."""
    names = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(params))
    return ptx.parse(
        f"{HEAD.format(target=target)}{outer}\n"
        f".visible .entry k({names})\n"
        f"{{\n"
        f".reg .pred %p<16>;\n"
        f".reg .b16 %h<64>;\n"
        f".reg .b32 %r<300>;\n"
        f".reg .b64 %rd<64>;\n{declarations}\n{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def run(
    body,
    *arguments,
    threads=32,
    grid=1,
    cluster=1,
    shared=0,
    declarations="",
    outer="",
    options=None,
    target="sm_100a",
) -> Report:
    """Run a snippet with DeviceTensors (or Device first) as parameters %rd0, %rd1, ..."""
    device, tensors = arguments[0], arguments[1:]
    if options is not None:
        device.options = options
    program = device.program(module(body, len(tensors), declarations, outer, target), "k")
    params = struct.pack(f"<{len(tensors)}Q", *(t.pointer for t in tensors))
    return device.launch(program, (grid, 1, 1), (threads, 1, 1), params, (cluster, 1, 1), shared)


def evaluate(operation: str, out: np.dtype | type, *inputs: np.ndarray) -> np.ndarray:
    """Apply one PTX snippet lane by lane: sources %a, %b, ... of the inputs' widths, result %d of `out`'s width."""
    out = np.dtype(out)
    n = len(inputs[0])
    device = Device()
    result = device.empty((n * out.itemsize,), torch.uint8)
    tensors = [device.tensor(torch.from_numpy(np.ascontiguousarray(i).view(np.uint8).copy())) for i in inputs]
    lines, declarations = [], []
    for name, tensor_index, width in [
        *((chr(ord("a") + i), i + 1, x.dtype.itemsize) for i, x in enumerate(inputs)),
        ("d", 0, out.itemsize),
    ]:
        declarations.append(f".reg .b{8 * width if width > 1 else 16} %{name};")
        lines.append(f"mad.wide.u32 %rd{40 + tensor_index}, %r1, {width}, %rd{tensor_index};")
        if name != "d":
            lines.append(f"ld.global.b{8 * width} %{name}, [%rd{40 + tensor_index}];")
    body = "\n".join(
        [
            f"mov.u32 %r2, %ctaid.x;\nmad.lo.u32 %r1, %r2, 256, %r0;\nsetp.ge.u32 %p0, %r1, {n};\n@%p0 bra END;",
            *lines,
            operation,
            f"st.global.b{8 * out.itemsize} [%rd40], %d;",
            "END:",
        ]
    )
    run(body, device, result, *tensors, threads=256, grid=-(-n // 256), declarations="\n".join(declarations))
    return result.torch.numpy().copy().view(out)


MAP_TYPES = {
    torch.uint8: 0,
    torch.int16: 1,
    torch.int32: 3,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 10,
}


def tensor_map(tensor, box: tuple[int, ...], swizzle: int = 0) -> torch.Tensor:
    """A hardware tensor map of a DeviceTensor; `box` in the tensor's order (slowest first), swizzle 0..3."""
    view = tensor.torch
    sizes, strides, boxes = ([int(x) for x in reversed(v)] for v in (view.shape, view.stride(), box))
    words = [0] * 32
    words[0], words[1] = tensor.pointer & 0xFFFFFFFF, tensor.pointer >> 32
    words[2] = 2 | (len(sizes) - 1) << 4 | MAP_TYPES[view.dtype] << 7 | swizzle << 13
    for i in range(1, len(sizes)):
        units = strides[i] * view.dtype.itemsize // 16
        words[2 + i] = units & 0xFFFFFFFF
        words[7] |= units >> 32 << 4 * (i - 1)
    for i, size in enumerate(sizes):
        words[8 + i] = size - 1
    words[13] = boxes[0] - 1 << 24
    for i, extent in enumerate(boxes[1:]):
        words[14] |= extent - 1 << 8 * i
    return torch.from_numpy(np.array(words, np.uint32).view(np.uint8).copy())


__all__ = ["Device", "Options", "evaluate", "module", "run", "tensor_map"]
