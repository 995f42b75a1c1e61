"""Reading codes inside a Triton kernel: from packed integer words to float16 matrix operands in registers.

A word is 1, 2 or 4 bytes of one token's packed codes. Byte j of a word, nibble (or crumb) p of that byte, is one
*piece*: over the words of a tile it is a strided set of channels. Matrix products contract over channels in any order
as long as query and key agree on it, so each piece is its own small product and no code is ever moved to its natural
place. Two words that sit next to each other in a matrix fragment are combined by one byte permute, and OR-ing 0x6400
into a half turns a code c into the float16 number 1024 + c: three integer instructions give four numbers, against
twelve for unpack, convert and pack.

For values the contraction runs over tokens, so the two words of a permute come from neighbouring tokens: the transpose
that 8-bit operands otherwise need costs nothing.
"""

import triton
import triton.language as tl

RAISE = tl.constexpr(8388608.0)  # 2^23: a float32 plus this has the number, rounded, in its lowest bits
LOG2_255 = tl.constexpr(7.994353436858858)  # of the largest byte


@triton.constexpr_function
def _select_byte(word: int, byte: int, mask: int) -> str:
    """PTX leaving `byte` of two neighbouring words in the halves of register t, masked into float16 1024 + m*c."""
    keep = (mask << 16) | mask
    if word == 4:
        selector = ((4 + byte) << 12) | ((4 + byte) << 8) | (byte << 4) | byte
        pick = f"prmt.b32 t, $1, $2, {selector:#x};"
    elif byte:
        pick = "shr.u32 t, $1, 8;"
    else:
        pick = "mov.b32 t, $1;"
    return f"{pick} lop3.b32 t, t, {keep:#x}, 0x64006400, 0xEA;"


@triton.constexpr_function
def _half2(x: float) -> str:
    """The float16 pair (x, x) as a PTX immediate; x is a power of two or an integer that float16 holds exactly."""
    import struct

    (h,) = struct.unpack("<H", struct.pack("<e", x))
    return f"{(h << 16) | h:#x}"


@triton.constexpr_function
def _word_asm(word: int, byte: int, mask: int, unit: int, centre: int) -> str:
    """PTX from a pair of words to a pair of float16: 1024 + unit*c, or c - centre when centre is given."""
    body = _select_byte(word, byte, mask)
    if not centre:
        return f"{{ .reg .b32 t; {body} mov.b32 $0, t; }}"
    return (
        f"{{ .reg .b32 t, m, a; {body} mov.b32 m, {_half2(1.0 / unit)}; mov.b32 a, {_half2(-(1024.0 / unit) - centre)};"
        " fma.rn.f16x2 $0, t, m, a; }"
    )


@triton.constexpr_function
def _byte_asm(mask: int, unit: int, centre: int) -> str:
    """As `_word_asm` for words of one byte: four bytes in one register become two pairs."""
    keep = (mask << 16) | mask
    body = (
        "prmt.b32 t, $2, 0, 0x4140; prmt.b32 u, $2, 0, 0x4342;"
        f" lop3.b32 t, t, {keep:#x}, 0x64006400, 0xEA; lop3.b32 u, u, {keep:#x}, 0x64006400, 0xEA;"
    )
    if not centre:
        return f"{{ .reg .b32 t, u; {body} mov.b32 $0, t; mov.b32 $1, u; }}"
    return (
        f"{{ .reg .b32 t, u, m, a; {body} mov.b32 m, {_half2(1.0 / unit)};"
        f" mov.b32 a, {_half2(-(1024.0 / unit) - centre)}; fma.rn.f16x2 $0, t, m, a; fma.rn.f16x2 $1, u, m, a; }}"
    )


@triton.jit
def piece(x, WORD: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr,
          CENTRE: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """Piece (BYTE, PART) of a tile of integer words.

    CENTRE 0: the float16 numbers 1024 + 2^(BITS*PART) * code (the caller folds offset and unit away);
    otherwise code - CENTRE exactly, in DT.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << (BITS * PART)
    UNIT: tl.constexpr = 1 << (BITS * PART)
    if ASM and DT == tl.float16:
        if WORD == 4:
            y = tl.inline_asm_elementwise(_word_asm(WORD, BYTE, MASK, UNIT, CENTRE), "=r,r,r", [x],
                                          dtype=tl.float16, is_pure=True, pack=2)
        elif WORD == 2:
            y = tl.inline_asm_elementwise(_word_asm(WORD, BYTE, MASK, UNIT, CENTRE), "=r,r", [x],
                                          dtype=tl.float16, is_pure=True, pack=2)
        else:
            y = tl.inline_asm_elementwise(_byte_asm(MASK, UNIT, CENTRE), "=r,=r,r", [x],
                                          dtype=tl.float16, is_pure=True, pack=4)
    else:
        code = (x.to(tl.int32) >> (8 * BYTE)) & MASK
        if CENTRE == 0:
            y = (code + 1024).to(DT)
        else:
            y = ((code >> (BITS * PART)) - CENTRE).to(DT)
    return y


@triton.constexpr_function
def _fp8_asm(word: int, byte: int) -> str:
    """PTX from a pair of words to float16 pairs holding float8 e4m3 values times 2^-8: sign kept, rest moved down."""
    if word == 4:
        selector = ((4 + byte) << 12) | ((4 + byte) << 8) | (byte << 4) | byte
        pick = f"prmt.b32 t, $1, $2, {selector:#x};"
    else:
        pick = "mov.b32 t, $1;" if byte else "shl.b32 t, $1, 8;"
    return (
        f"{{ .reg .b32 t, u; {pick} shr.u32 u, t, 1; and.b32 u, u, 0x3f803f80;"
        " lop3.b32 $0, t, 0x80008000, u, 0xEA; }"
    )


@triton.jit
def fp8_piece(x, WORD: tl.constexpr, BYTE: tl.constexpr):
    """Byte BYTE of a tile of integer words read as float8 e4m3, as float16 times 2^-8 (exact, subnormals included)."""
    if WORD == 4:
        y = tl.inline_asm_elementwise(_fp8_asm(WORD, BYTE), "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        y = tl.inline_asm_elementwise(_fp8_asm(WORD, BYTE), "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    return y
