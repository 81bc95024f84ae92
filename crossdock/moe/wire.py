"""`Fp8Wire`: dispatched rows as e4m3 codes with a float32 scale for each 128 values, half the bytes of bfloat16.

Experts held in fp8_block quantise their rows with the same function anyway, so they take codes and scales from the wire
as they are and give the bits they give without it. Others compute with the values decoded: their output changes, and is
the same for any number of ranks, as rows are encoded even where none travels.

    a row, uint8 [X]    | D codes | zeros up to a multiple of 16 | 4 * ceil(D / 128) bytes of scales | zeros, same |

Both parts start at, and rows lie at, multiples of 16 bytes from one another: views of them are what kernels read.
Rejected: codes and scales as two exchanges, a second latency for 3% of the bytes.

Legend: T tokens, R rows, D hidden, B blocks of 128 along D, X bytes of a row.
"""

import torch
from torch import Tensor

from crossdock.backend import Backend
from crossdock.errors import ConfigError
from crossdock.gemm import BLOCK, dequantize_rows, quantize_rows
from crossdock.moe.wire_cpu import decode_rows

ALIGN = 16
CACHED = 1 << 18  # values that a CPU encodes at a time


class Fp8Wire:
    """A `Codec` for rows of `hidden_size` values of bf16, fp16 or fp32. `pow2`: scales are powers of two.

    `decode_on_arrival` for experts that do not take codes: then some rows are decoded while others are under way.
    """

    def __init__(
        self, hidden_size: int, *, pow2: bool = False, decode_on_arrival: bool = False, backend: Backend = "auto"
    ) -> None:
        self.hidden_size, self.pow2, self.backend = hidden_size, pow2, backend
        self.decode_on_arrival = decode_on_arrival
        self._scales_at = _aligned(hidden_size)
        self._scale_bytes = 4 * -(-hidden_size // BLOCK)

    def row_bytes(self, hidden_size: int) -> int:
        """X. Raises ConfigError for rows of another size than this one's."""
        if hidden_size != self.hidden_size:
            raise ConfigError(f"this wire was made for rows of {self.hidden_size} values, found {hidden_size}")
        return self._scales_at + _aligned(self._scale_bytes)

    def encode(self, x_TD: Tensor) -> Tensor:
        """uint8 [T, X]."""
        rows_TX = x_TD.new_empty(len(x_TD), self.row_bytes(x_TD.shape[1]), dtype=torch.uint8)
        scales_end = self._scales_at + self._scale_bytes
        rows_TX[:, self.hidden_size : self._scales_at] = 0
        rows_TX[:, scales_end:] = 0
        codes_TD, scale_TB = self.parts(rows_TX)
        portion = max(1, len(x_TD) if x_TD.device.type != "cpu" else CACHED // self.hidden_size)
        for first in range(0, len(x_TD), portion):
            some = slice(first, first + portion)
            codes_TD[some], scale_TB[some] = quantize_rows(x_TD[some], pow2=self.pow2, backend=self.backend)
        return rows_TX

    def parts(self, rows_RX: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [R, D] e4m3 and scales [R, B] float32, views of the rows."""
        codes_RD = rows_RX[:, : self.hidden_size].view(torch.float8_e4m3fn)
        return codes_RD, rows_RX[:, self._scales_at : self._scales_at + self._scale_bytes].view(torch.float32)

    def decode(self, rows_RX: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, D] in `dtype`: code times scale in float32, rounded once."""
        codes_RD, scale_RB = self.parts(rows_RX)
        if codes_RD.device.type == "cpu" and self.hidden_size % BLOCK == 0:
            return decode_rows(codes_RD, scale_RB, dtype)
        return dequantize_rows(codes_RD, scale_RB, dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
