"""NVSHMEM's device functions as CuTeDSL calls them: externs of the bitcode in the package nvidia-nvshmem-cu13.

A kernel that calls one holds NVSHMEM's device state, which the host library of the same version has to fill in before
the first launch.
"""

# Without `from __future__ import annotations`: CuTeDSL reads the types of an extern's parameters.
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from cutlass import Int8, Int32, Int64, Uint64, cute
from cutlass._mlir.dialects.cute import PtrType
from cutlass.base_dsl.typing import get_mlir_types
from cutlass.cute import AddressSpace

from nmoe.codegen.rails import PACKAGE, VERSION
from nmoe.codegen.templates.fixed import Fixed
from nmoe.errors import UserError

SET, ADD = 9, 10  # NVSHMEM_SIGNAL_SET, NVSHMEM_SIGNAL_ADD


class Address:
    """The type of a parameter: where elements of a type lie in global memory."""

    def __init__(self, element: Any) -> None:
        self._element = element

    def __get_mlir_types__(self) -> list[Any]:
        return [PtrType.get(self._element.mlir_type, AddressSpace.gmem, self._element.width // 8)]

    def isinstance(self, value: Any) -> bool:
        return get_mlir_types(value) == self.__get_mlir_types__()


def bitcode(capability: int, version: str = VERSION) -> Path:
    """Of a compute capability. Raises UserError unless exactly this version is installed."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = "nothing"
    spec = importlib.util.find_spec("nvidia.nvshmem") if found == version else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"kernels between hosts are linked with {PACKAGE} {version}, found {found}: "
            f"pip install {PACKAGE}=={version}"
        )
    return Path(spec.submodule_search_locations[0]) / "lib" / f"libnvshmem_device_sm_{capability}.bc"


class Nvshmem(Fixed):
    """What a kernel asks of NVSHMEM. Addresses are this rank's own, of symmetric memory; `peer` is the rank whose
    memory is meant."""

    def __init__(self, capability: int) -> None:
        source = cute.BitCode(str(bitcode(capability)))
        byte, word = Address(Int8), Address(Uint64)

        @cute.extern(name="nvshmemx_putmem_signal_nbi_block", source=source)
        def put(
            to: byte,  # type: ignore[valid-type]
            what: byte,  # type: ignore[valid-type]
            size: Uint64,
            flag: word,  # type: ignore[valid-type]
            value: Uint64,
            how: Int32,
            peer: Int32,
        ) -> None: ...

        @cute.extern(name="nvshmemx_signal_op", source=source)
        def signal(flag: word, value: Uint64, how: Int32, peer: Int32) -> None: ...  # type: ignore[valid-type]

        @cute.extern(name="nvshmem_quiet", source=source)
        def quiet() -> None: ...

        self._put, self._signal, self._quiet = put, signal, quiet

    def put(self, target: cute.Pointer, source: cute.Pointer, size: Int64, flag: cute.Pointer, value: Int64,
            peer: Int32) -> None:  # fmt: skip
        """By all threads of a block: bytes, then flag += value. Returns before they have been read (see `quiet`)."""
        self._put(
            _at(Int8, target),
            _at(Int8, source),
            Uint64(size),
            _at(Uint64, flag),
            Uint64(value),
            Int32(ADD),
            peer,
        )

    def set(self, flag: cute.Pointer, value: Int64, peer: Int32) -> None:
        """By one thread."""
        self._signal(_at(Uint64, flag), Uint64(value), Int32(SET), peer)

    def quiet(self) -> None:
        """By one thread: until all puts of this rank have arrived."""
        self._quiet()


def _at(element: Any, pointer: cute.Pointer) -> cute.Pointer:
    """The pointer as an extern takes it."""
    return cute.make_ptr(element, pointer.toint(), AddressSpace.gmem, assumed_align=element.width // 8)
