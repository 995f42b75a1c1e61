"""Ways to hold one weight matrix on a CPU and multiply rows by it.

A store keeps W [N, K] (N outputs, K inputs) in one form and answers ``product(x)``: x [M, K] float32 -> x W^T [M, N]
float32. Decoding multiplies single rows, which is bound by the bytes of W that are read; a prompt multiplies many
rows, which is bound by arithmetic. The choices below were measured on two Zen 4 cores with torch 2.13:

- MKL's one-row float32 product runs on one thread, and reads faster down the columns of a wide matrix. So W is cut
  into as many slabs as there are threads, transposed where N > K, and multiplied as a batch (28 against 11 GB/s).
- torch's packed int8 and int4 kernels want bfloat16 activations (float32 ones are 6 times slower) and read 13 GB/s;
  from about 24 rows on, turning W back into bfloat16 and using the ordinary product is faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from collections.abc import Iterator

import torch

from lab.models.quantise import GROUP, quantise_int4, quantise_int8, unpack_int4

MANY_ROWS = 24
_BLOCK = 4096
_NARROW_SLAB = 32

_kernels_only = False


@contextmanager
def kernels_only() -> Iterator[None]:
    """Inside, int8 and int4 stores use their decode kernels for any number of rows: for measuring their quality."""
    global _kernels_only
    before, _kernels_only = _kernels_only, True
    try:
        yield
    finally:
        _kernels_only = before


def using_kernels() -> bool:
    """Whether this runs inside ``kernels_only``."""
    return _kernels_only


class Store(ABC):
    """One weight matrix [N, K] in some form.

    Attributes:
        mode: the form's name. rows, columns: N and K.
    """

    mode: str
    rows: int
    columns: int

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] float32 -> x W^T [M, N] float32."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """W [N, K] in float32, as it acts."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""


class FloatStore(Store):
    """float32, laid out for one-row products."""

    mode = "float32"

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows, self.columns = weight.shape
        slabs = torch.get_num_threads()
        while self.rows % slabs or self.rows // slabs < _NARROW_SLAB and slabs > 1:
            slabs -= 1
        # [slabs, K, N/slabs]: transposed in memory where that reads faster, else the rows as they are. Copied either
        # way: what safetensors hands out is mapped from the file, and dies with it when somebody rewrites that file.
        self.count = slabs
        slab = weight.detach().float().reshape(slabs, self.rows // slabs, self.columns).transpose(1, 2)
        wide = self.rows > self.columns
        self.slabs = (slab.clone(memory_format=torch.contiguous_format) if wide
                      else slab.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return torch.bmm(x.expand(self.count, -1, -1), self.slabs).view(1, -1)
        if self.count == 1:
            return x @ self.slabs[0]
        out = torch.bmm(x.expand(self.count, -1, -1), self.slabs)
        return out.transpose(0, 1).reshape(x.shape[0], self.rows)

    def dense(self) -> torch.Tensor:
        return self.slabs.transpose(1, 2).reshape(self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        return self.slabs.nbytes


class BFloat16Store(Store):
    """bfloat16 weights and activations; results return to float32."""

    mode = "bfloat16"

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows, self.columns = weight.shape
        self.weight = weight.detach().to(torch.bfloat16).contiguous()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.to(torch.bfloat16), self.weight).float()

    def dense(self) -> torch.Tensor:
        return self.weight.float()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class Int8Store(Store):
    """int8 codes with one bfloat16 scale per output."""

    mode = "int8"

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows, self.columns = weight.shape
        self.codes, self.scales = quantise_int8(weight)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16)
        if x.shape[0] < MANY_ROWS or _kernels_only:
            return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales).float()
        out = x.new_empty(x.shape[0], self.rows, dtype=torch.float32)
        for at in range(0, self.rows, _BLOCK):  # in blocks, so that the unpacked piece stays in the processor's cache
            # Codes are exact in bfloat16; the scale is applied to the result, where nothing is rounded.
            piece = torch.nn.functional.linear(x, self.codes[at:at + _BLOCK].to(torch.bfloat16))
            torch.mul(piece, self.scales[at:at + _BLOCK].float(), out=out[:, at:at + _BLOCK])
        return out

    def dense(self) -> torch.Tensor:
        return self.codes.float() * self.scales.float()[:, None]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


PARTS = ("packed", "nibbles", "affine")


class Int4Store(Store):
    """int4 codes with a bfloat16 scale and centre per group of 32 inputs.

    Two copies of the codes are held: one in the layout of torch's decode kernel, which depends on the processor and
    cannot be read back, and one in nibbles for many rows. Together they take about one byte per weight.
    """

    mode = "int4"

    def __init__(self, weight: torch.Tensor) -> None:
        codes, nibbles, affine = quantise_int4(weight)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._hold({"packed": packed, "nibbles": nibbles, "affine": affine})

    @classmethod
    def restored(cls, parts: dict[str, torch.Tensor]) -> Int4Store:
        """A store from another one's ``parts``, made on the same kind of processor."""
        store = cls.__new__(cls)
        store._hold({name: tensor.clone() for name, tensor in parts.items()})  # no longer mapped from a file
        return store

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that ``restored`` needs; searching for the scales takes seconds, reading them does not."""
        return {name: getattr(self, name) for name in PARTS}

    def _hold(self, parts: dict[str, torch.Tensor]) -> None:
        self.packed, self.nibbles, self.affine = (parts[name] for name in PARTS)
        self.rows, self.columns = self.nibbles.shape[0], self.nibbles.shape[1] * 2
        self.kernel_affine = self.affine.transpose(0, 1).contiguous()

    @staticmethod
    def fits(rows: int, columns: int) -> bool:
        """Whether torch's kernel takes a matrix of this shape."""
        return rows % 16 == 0 and columns % GROUP == 0

    def product(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16)
        if x.shape[0] < MANY_ROWS or _kernels_only:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.kernel_affine).float()
        pieces = []
        for at in range(0, self.rows, _BLOCK):
            block = unpack_int4(self.nibbles[at:at + _BLOCK], self.affine[at:at + _BLOCK], torch.bfloat16)
            pieces.append(torch.nn.functional.linear(x, block).float())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def dense(self) -> torch.Tensor:
        return unpack_int4(self.nibbles, self.affine, torch.float32)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.nibbles.nbytes + 2 * self.affine.nbytes


_STORES: dict[str, type[Store]] = {kind.mode: kind for kind in (FloatStore, BFloat16Store, Int8Store, Int4Store)}
MODES = tuple(_STORES)


def make_store(weight: torch.Tensor, mode: str) -> Store:
    """W [N, K] held in ``mode``; a shape that int4's kernel does not take is held in int8."""
    if mode == "int4" and not Int4Store.fits(*weight.shape):
        mode = "int8"
    return _STORES[mode](weight)  # type: ignore[call-arg]
