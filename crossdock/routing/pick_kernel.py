# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""The K largest keys of a row, in falling order, ties to the lowest place: the heart of the select kernel, in two ways.

Both compare keys as integers: a float's bits, those below the sign inverted where it is negative, order as the float
does, and NVIDIA GPUs reduce integers over a warp in one instruction (redux), where a float with its index takes five
rounds of shuffles. `pick_in_rounds` takes the largest key and then its lowest place, K times: about six instructions
for every key and round. `pick_by_code` makes one integer of both first,

    code    0 | distance below the row's largest key, >> shift | place        the smaller the better, no two alike
    bits    2 | 30 - log2(P)                                   | log2(P)

so that a round is one subtraction and one minimum for every key, and removes nothing: it looks for the least code above
the last. `shift` makes the distance fit. It need only span the keys that can matter, which the largest keys of K_PAD
bins bound from below: at least K keys are no smaller than the smallest of those. Where two of the K + 1 best share what
is left of the distance, the order is not sure, and the row is done anew in rounds: of rows of random sigmoids one in
three thousand with E=896, none in twenty thousand with E=256, and rows whose best keys tie. The result is exact always.

sm_90, one warp a row, as compiled by Triton 3.7: instructions, and cycles by dependences and usual latencies:

                     argmax with index     in rounds         by code         tl.topk of 64 bits
    E=256 K=8         1568    4022          642   1334        280    884         864   1602
    E=384 K=8         2946    7209         1015   1859        416   1050        1664   2564
    E=512 K=10        2015    5169         1365   2401        520   1227        2200   3181
    E=896 K=16        3907    9368         3527   5535       1192   2104        4360   8999

Rounds stay for fewer experts, where one program can take several rows, and because they find scores on their way.
Rejected, besides the outer columns: a threshold by bisection (eight or so counts of the whole row), then compaction of
what is above it by bit masks and prefix sums (E=896: 2866 instructions, the compaction half of them), and histograms of
digits (sigmoids share their leading digit, so all lanes meet in one bin).

Legend: P places of a row (a power of two, at least the experts), K experts per token, K_PAD the power of two from K.
"""

import torch
from torch import Tensor

from crossdock._triton import tl, triton

CODES_FROM = 256  # places from which one row by code takes fewer instructions than its share of several in rounds


def pick_ref(keys_TP: Tensor, top_k: int) -> Tensor:
    """Places [T, K] of the largest keys, -1 where a key is -inf: what both ways give."""
    ordered = torch.sort(keys_TP, dim=-1, descending=True, stable=True)
    return torch.where(ordered.values > float("-inf"), ordered.indices, -1)[:, :top_k]


@triton.jit
def ordered_bits(key):
    """int32 that order as the float32 keys do. Keys are not NaN and not -0.0."""
    bits = key.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def pick_in_rounds(key, score, ROWS: tl.constexpr, P: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr):
    """Keys [ROWS, P] -> places [ROWS, K_PAD] int32, -1 behind the last that can be selected, and the scores there."""
    NEVER_BITS: tl.constexpr = -0x7F800001  # ordered_bits of -inf, less than which no key has
    place = tl.arange(0, P)
    choice = tl.arange(0, K_PAD)
    bits = ordered_bits(key)
    score = score.to(tl.int32, bitcast=True)  # a sum of one of these and zeros is a reduction of integers too
    places = tl.full([ROWS, K_PAD], -1, tl.int32)
    scores = tl.zeros([ROWS, K_PAD], tl.int32)
    for k in range(K):
        top = tl.max(bits, axis=1)
        first = tl.min(tl.where(bits == top[:, None], place[None, :], P), axis=1)
        is_first = place[None, :] == first[:, None]
        scored = tl.sum(tl.where(is_first, score, 0), axis=1)
        is_new = (choice == k)[None, :] & (top > NEVER_BITS)[:, None]
        places = tl.where(is_new, first[:, None], places)
        scores = tl.where(is_new, scored[:, None], scores)
        bits = tl.where(is_first, NEVER_BITS, bits)
    return places, scores.to(tl.float32, bitcast=True)


@triton.jit
def pick_by_code(key, P: tl.constexpr, LOG_P: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr):
    """Keys [P] of one row -> places [K_PAD] int32, as `pick_in_rounds`."""
    NEVER_BITS: tl.constexpr = -0x7F800001
    NO_CODE: tl.constexpr = 0x7FFFFFFF
    place = tl.arange(0, P)
    choice = tl.arange(0, K_PAD)
    bits = ordered_bits(key)
    bin_tops = tl.max(tl.reshape(bits, [P // K_PAD, K_PAD]), axis=0)
    high = tl.maximum(tl.max(bin_tops, axis=0), NEVER_BITS + 1)
    low = tl.maximum(tl.min(bin_tops, axis=0), NEVER_BITS + 1)
    # The difference of two int32 may need 32 bits, which it has when read as unsigned. The exponent of a float32 gives
    # how many bits the part of it has that does not fit; that part has 14 at most, so the float is exact.
    span = (high - low).to(tl.uint32, bitcast=True)
    excess = (span >> (30 - LOG_P)).to(tl.float32).to(tl.int32, bitcast=True)
    shift = tl.maximum((excess >> 23) - 126, 0)
    distance = (high - bits).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    code = tl.where(bits >= low, (distance << LOG_P) | place.to(tl.uint32), NO_CODE)

    codes = tl.full([K_PAD], NO_CODE, tl.uint32)
    start = tl.full([], 0, tl.uint32)
    last = tl.full([], NO_CODE, tl.uint32)
    unsure = 0
    for k in range(K + 1):
        found = tl.min(code - start, axis=0) + start  # codes below `start` wrap to more than any code
        unsure += ((found >> LOG_P) == (last >> LOG_P)).to(tl.int32)
        codes = tl.where(choice == k, found, codes)
        last = tl.where(found == NO_CODE, last, found)
        start = tl.minimum(found + 1, NO_CODE)
    is_found = (codes != NO_CODE) & (choice < K)
    places = tl.where(is_found, (codes & (P - 1)).to(tl.int32), -1)

    # As a loop of no rounds where the order is sure; Triton 3.7 fails on some branches that give tensors.
    for k in range(tl.where((unsure > 0) & (shift > 0), K, 0)):
        top = tl.max(bits, axis=0)
        first = tl.min(tl.where(bits == top, place, P), axis=0)
        places = tl.where(choice == k, tl.where(top > NEVER_BITS, first, -1), places)
        bits = tl.where(place == first, NEVER_BITS, bits)
    return places
