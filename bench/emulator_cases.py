"""The launches that calibrate the emulator: hand-written sm_90a PTX with its inputs. See bench/emulator.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"
MAP_KINDS = {"f32": (7, 7), "bf16": (10, 9)}  # hardware code, CUtensorMapDataType


@dataclass(frozen=True)
class Map:
    """A 2-D tensor map of a buffer: sizes and box fastest dimension first, elements of `kind`."""

    buffer: int
    kind: str
    sizes: tuple[int, int]
    box: tuple[int, int]
    swizzle: int

    @property
    def pitch(self) -> int:
        return self.sizes[0] * (4 if self.kind == "f32" else 2)


@dataclass
class Case:
    """A launch: buffers are passed as pointers, then the maps; `results` are the buffers to compare. `exact` is false
    where hardware is free in rounding or summation order."""

    name: str
    text: str
    buffers: list[np.ndarray]
    results: tuple[int, ...]
    grid: int = 1
    block: int = 32
    cluster: int = 1
    maps: list[Map] = field(default_factory=list)
    exact: bool = True


def entry(body: str, pointers: int, maps: int = 0, declarations: str = "") -> str:
    params = [f".param .u64 p{i}" for i in range(pointers)] + [
        f".param .align 64 .b8 m{i}[128]" for i in range(maps)
    ]
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(pointers))
    return (
        f"{HEAD}.visible .entry k({', '.join(params)})\n{{\n.reg .pred %p<16>;\n.reg .b16 %h<16>;\n.reg .b32 %r<200>;\n"
        f".reg .b64 %rd<64>;\n{declarations}\n{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def lanewise(name: str, operation: str, out: type, *inputs: np.ndarray, exact: bool = True) -> Case:
    """One snippet on every element: sources %a, %b, %c, result %d."""
    width = np.dtype(out).itemsize
    declarations, lines = [f".reg .b{8 * width} %d;"], []
    for i, values in enumerate(inputs):
        size = values.dtype.itemsize
        declarations.append(f".reg .b{8 * size} %{'abc'[i]};")
        lines.append(
            f"mad.wide.u32 %rd{41 + i}, %r1, {size}, %rd{1 + i};\nld.global.b{8 * size} %{'abc'[i]}, [%rd{41 + i}];"
        )
    body = "\n".join(
        [
            f"mov.u32 %r2, %ctaid.x;\n"
            f"mad.lo.u32 %r1, %r2, 256, %r0;\n"
            f"setp.ge.u32 %p0, %r1, {inputs[0].size};\n"
            f"@%p0 ret;",
            *lines,
            operation,
            f"mad.wide.u32 %rd40, %r1, {width}, %rd0;\nst.global.b{8 * width} [%rd40], %d;",
        ]
    )
    buffers = [np.zeros(inputs[0].size, out), *inputs]
    return Case(
        name,
        entry(body, len(buffers), declarations="\n".join(declarations)),
        buffers,
        (0,),
        -(-inputs[0].size // 256),
        256,
        exact=exact,
    )


def conversion_cases() -> list[Case]:
    half = np.arange(65536, dtype=np.uint16)
    bfloat = half.astype(np.uint32) << 16
    widened = half.view(np.float16).astype(np.float32).view(np.uint32)
    cases = []
    for label, values in (("f16", widened), ("bf16", bfloat)):
        for kind in ("e4m3", "e5m2"):
            operation = f"cvt.rn.satfinite.{kind}x2.f32 %h1, %a, %b;\ncvt.u32.u16 %d, %h1;"
            cases.append(
                lanewise(f"{kind}x2 from every {label}", operation, np.uint32, values, values[::-1].copy())
            )
    for kind in ("e4m3", "e5m2"):
        operation = f"cvt.u16.u32 %h1, %a;\ncvt.rn.f16x2.{kind}x2 %d, %h1;"
        cases.append(lanewise(f"f16x2 from every {kind}x2", operation, np.uint32, half.astype(np.uint32)))
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 1 << 18, dtype=np.uint32)
    for operation in ("cvt.rn.f16x2.f32", "cvt.rz.f16x2.f32", "cvt.rn.bf16x2.f32", "cvt.rn.relu.bf16x2.f32"):
        cases.append(
            lanewise(operation, f"{operation} %d, %a, %b;", np.uint32, anything, anything[::-1].copy())
        )
    for operation in (
        "cvt.rni.s32.f32",
        "cvt.rzi.u32.f32",
        "cvt.rmi.f32.f32",
        "cvt.rn.f32.s32",
        "cvt.rz.f32.u32",
        "cvt.rna.tf32.f32",
        "cvt.rni.ftz.s32.f32",
    ):
        cases.append(lanewise(operation, f"{operation} %d, %a;", np.uint32, anything))
    return cases


def arithmetic_cases() -> list[Case]:
    rng = np.random.default_rng(1)
    edges = np.array(
        [
            0,
            1,
            2,
            31,
            32,
            33,
            0x7F,
            0x80,
            0x7FFF,
            0x8000,
            0x7F800000,
            0x7F800001,
            0x7FC00000,
            0x7FFFFFFF,
            0x80000000,
            0x80000001,
            0x00800000,
            0x007FFFFF,
            0x3F800000,
            0xBF800000,
            0xFF800000,
            0xFFFFFFFF,
        ],
        np.uint32,
    )
    pairs = np.array(np.meshgrid(edges, edges)).reshape(2, -1)
    random = rng.integers(0, 2**32, (3, 1 << 16), dtype=np.uint32)
    a, b = (np.concatenate([pairs[i], random[i]]) for i in range(2))
    c = np.concatenate([pairs[0][::-1], random[2]])
    cases = []
    for operation in (
        "add.s32",
        "mul.hi.s32",
        "mul.lo.u32",
        "min.s32",
        "max.u32",
        "shl.b32",
        "shr.s32",
        "shr.u32",
        "add.sat.s32",
        "add.f32",
        "add.rz.f32",
        "mul.rp.f32",
        "mul.ftz.f32",
        "add.sat.f32",
        "min.f32",
        "max.NaN.f32",
        "div.rn.f32",
        "add.rn.f16x2",
        "mul.rn.f16x2",
        "add.rn.bf16x2",
        "mul.rn.bf16x2",
        "max.bf16x2",
    ):
        cases.append(lanewise(operation, f"{operation} %d, %a, %b;", np.uint32, a, b))
    for operation in (
        "fma.rn.f32",
        "fma.rm.ftz.f32",
        "mad.hi.u32",
        "prmt.b32",
        "bfe.s32",
        "bfe.u32",
        "shf.l.wrap.b32",
        "shf.r.clamp.b32",
        "fma.rn.f16x2",
        "fma.rn.bf16x2",
    ):
        cases.append(lanewise(operation, f"{operation} %d, %a, %b, %c;", np.uint32, a, b, c))
    for operation in ("popc.b32", "clz.b32", "brev.b32", "bfind.s32", "sqrt.rn.f32", "rcp.rn.f32"):
        cases.append(lanewise(operation, f"{operation} %d, %a;", np.uint32, a))
    for operation in ("div.s32", "rem.s32", "div.u32"):
        cases.append(
            lanewise(
                operation, f"{operation} %d, %a, %b;", np.uint32, a, np.where(b == 0, 1, b).astype(np.uint32)
            )
        )
    plain = rng.uniform(0.01, 4, 1 << 16).astype(np.float32).view(np.uint32)
    special = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF], np.uint32)
    for operation in (
        "ex2.approx.f32",
        "lg2.approx.f32",
        "rcp.approx.f32",
        "rsqrt.approx.f32",
        "sqrt.approx.f32",
        "tanh.approx.f32",
        "sin.approx.f32",
        "cos.approx.f32",
    ):
        cases.append(lanewise(operation, f"{operation} %d, %a;", np.uint32, plain, exact=False))
        cases.append(
            lanewise(f"{operation} of zeros, infinities, NaN", f"{operation} %d, %a;", np.uint32, special)
        )
    return cases


def warp_cases() -> list[Case]:
    values = np.random.default_rng(2).integers(0, 64, 1024, dtype=np.uint32)
    snippets = {
        "shfl.idx in segments": "shfl.sync.idx.b32 %d, %a, 3, 0x181f, -1;",
        "shfl.up": "shfl.sync.up.b32 %d|%p1, %a, 5, 0, -1;\n@!%p1 mov.u32 %d, 99;",
        "shfl.down": "shfl.sync.down.b32 %d|%p1, %a, 5, 31, -1;\n@!%p1 mov.u32 %d, 99;",
        "shfl.bfly": "shfl.sync.bfly.b32 %d, %a, 6, 0x1c1f, -1;",
        "vote.ballot": "setp.gt.u32 %p1, %a, 31;\nvote.sync.ballot.b32 %d, %p1, -1;",
        "match.any": "match.any.sync.b32 %d, %a, -1;",
        "redux.add": "redux.sync.add.u32 %d, %a, -1;",
        "redux.min": "redux.sync.min.s32 %d, %a, -1;",
    }
    return [lanewise(name, text, np.uint32, values) for name, text in snippets.items()]


SHARED = ".shared .align 1024 .b8 buf[32768];\n.shared .align 8 .b8 bar[64];"


def ping_pong_case() -> Case:
    body = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 32;
    @%p1 mbarrier.init.shared.b64 [bar+8], 32;
    bar.sync 0;
    mov.u32 %r1, 0;
    setp.ge.u32 %p3, %r0, 32;
    @%p3 bra CONSUME;
    PRODUCE: and.b32 %r2, %r1, 1;
    xor.b32 %r3, %r2, 1;
    P: mbarrier.try_wait.parity.shared.b64 %p2, [bar+8], %r3;
    @!%p2 bra P;
    mad.lo.u32 %r4, %r1, %r1, 7;
    @%p1 st.shared.b32 [buf], %r4;
    mbarrier.arrive.shared.b64 %rd9, [bar];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 100;
    @%p4 bra PRODUCE;
    bra END;
    CONSUME: and.b32 %r2, %r1, 1;
    C: mbarrier.try_wait.parity.shared.b64 %p2, [bar], %r2;
    @!%p2 bra C;
    ld.shared.b32 %r5, [buf];
    mad.wide.u32 %rd1, %r1, 4, %rd0;
    st.global.b32 [%rd1], %r5;
    mbarrier.arrive.shared.b64 %rd9, [bar+8];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 100;
    @%p4 bra CONSUME;
    END:
    """
    return Case(
        "mbarrier ping-pong", entry(body, 1, declarations=SHARED), [np.zeros(100, np.uint32)], (0,), block=64
    )


def reduction_case(kind: str) -> Case:
    rng = np.random.default_rng(3)
    element = 4 if kind == "f32" else 2
    start, tile = (rng.integers(-99, 99, (20, 32)).astype(np.float32) for _ in range(2))
    if kind == "bf16":
        start, tile = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (start, tile))
    words = 8 * 32 * element // 4
    body = f"""
    mov.u32 %r2, buf;
    mov.u32 %r10, %r0;
    F: mad.lo.u32 %r11, %r10, 4, %r2;
    mad.wide.u32 %rd10, %r10, 4, %rd1;
    ld.global.b32 %r12, [%rd10];
    st.shared.b32 [%r11], %r12;
    add.u32 %r10, %r10, 32;
    setp.lt.u32 %p3, %r10, {words};
    @%p3 bra F;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 ret;
    mov.b64 %rd2, m0;
    cvta.param.u64 %rd3, %rd2;
    cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%rd3, {{{16 // element}, 15}}], [%r2];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    return Case(
        f"TMA reduce-add {kind}, clipped",
        entry(body, 2, 1, SHARED),
        [start, tile],
        (0,),
        maps=[Map(0, kind, (32, 20), (32, 8), 0)],
    )


def gemm_case(exact: bool) -> Case:
    """C[128, 64] = A[128, 256] B[64, 256]^T in bf16 by a cluster of two CTAs, two stages, half of B loaded by each."""
    rng = np.random.default_rng(4)
    values = [
        rng.integers(-8, 8, shape) if exact else rng.standard_normal(shape)
        for shape in ((128, 256), (64, 256))
    ]
    a, b = ((v.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for v in values)
    high = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
    accumulators = ", ".join(f"%r{100 + i}" for i in range(32))
    lines = [
        """
    mov.u32 %r2, buf;
    mov.u32 %r3, %cluster_ctarank;
    setp.eq.u32 %p1, %r0, 0;
    @!%p1 bra READY;
    mbarrier.init.shared.b64 [bar], 1;
    mbarrier.init.shared.b64 [bar+8], 1;
    mbarrier.init.shared.b64 [bar+16], 2;
    mbarrier.init.shared.b64 [bar+24], 2;
    fence.mbarrier_init.release.cluster;
    READY: barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    mov.b64 %rd2, m0;
    cvta.param.u64 %rd3, %rd2;
    mov.b64 %rd4, m1;
    cvta.param.u64 %rd5, %rd4;
    mul.lo.u32 %r4, %r3, 64;
    mul.lo.u32 %r5, %r3, 32;
    mul.lo.u32 %r6, %r3, 4096;
    xor.b32 %r7, %r3, 1;
    mov.u32 %r8, bar;
    mapa.shared::cluster.u32 %r9, %r8, %r7;
    mov.u16 %h1, 3;
    and.b32 %r11, %r2, 0x3FFFF;
    shr.u32 %r11, %r11, 4;
    cvt.u64.u32 %rd20, %r11;
    """
    ]
    for k in range(4):
        stage, a_at = k & 1, (k & 1) * 16384
        lines.append(f"""
    @!%p1 bra LOADED{k};
    E{k}: mbarrier.try_wait.parity.shared.b64 %p2, [bar+{16 + 8 * stage}], {1 - (k >> 1)};
    @!%p2 bra E{k};
    mbarrier.arrive.expect_tx.shared.b64 _, [bar+{8 * stage}], 16384;
    add.u32 %r12, %r2, {a_at};
    add.u32 %r13, %r12, 8192;
    add.u32 %r13, %r13, %r6;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r12],
        [%rd3, {{{64 * k}, %r4}}], [bar+{8 * stage}];
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r13],
        [%rd5, {{{64 * k}, %r5}}], [bar+{8 * stage}], %h1;
    LOADED{k}: mbarrier.try_wait.parity.shared.b64 %p2, [bar+{8 * stage}], {k >> 1};
    @!%p2 bra LOADED{k};
    wgmma.fence.sync.aligned;""")
        for step in range(4):
            lines.append(f"""
    add.u64 %rd21, %rd20, {high + (a_at >> 4) + 2 * step};
    add.u64 %rd22, %rd20, {high + (a_at + 8192 >> 4) + 2 * step};
    setp.ne.u32 %p4, {int(k + step > 0)}, 0;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{accumulators}}}, %rd21, %rd22, %p4, 1, 1, 0, 0;""")
        lines.append(f"""
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 0;
    @%p1 mbarrier.arrive.shared.b64 %rd9, [bar+{16 + 8 * stage}];
    @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r9+{16 + 8 * stage}];""")
    lines.append("""
    shr.u32 %r20, %r0, 5;
    and.b32 %r21, %r0, 31;
    shr.u32 %r22, %r21, 2;
    mad.lo.u32 %r22, %r20, 16, %r22;
    add.u32 %r22, %r22, %r4;
    and.b32 %r23, %r21, 3;
    shl.b32 %r23, %r23, 1;
    mad.lo.u32 %r24, %r22, 64, %r23;
    mad.wide.u32 %rd10, %r24, 4, %rd0;""")
    for e in range(32):
        lines.append(
            f"st.global.b32 [%rd10+{4 * ((e >> 1 & 1) * 8 * 64 + e // 4 * 8 + (e & 1))}], %r{100 + e};"
        )
    lines.append("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;")
    name = f"bf16 GEMM: TMA, swizzle, multicast, wgmma ({'integers' if exact else 'random'})"
    return Case(
        name,
        entry("\n".join(lines), 3, 2, SHARED),
        [np.zeros((128, 64), np.float32), a, b],
        (0,),
        2,
        128,
        2,
        [Map(1, "bf16", (256, 128), (64, 64), 3), Map(2, "bf16", (256, 64), (64, 32), 3)],
        exact,
    )


def all_cases() -> list[Case]:
    return [
        *conversion_cases(),
        *arithmetic_cases(),
        *warp_cases(),
        ping_pong_case(),
        reduction_case("f32"),
        reduction_case("bf16"),
        gemm_case(True),
        gemm_case(False),
    ]
