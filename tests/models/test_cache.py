"""Pages: handed out clean, taken back, and refused when there are none."""

import pytest
import torch

from crossdock.errors import CapacityOverflow
from crossdock.models.cache import PagedCache, Sequence


def test_a_page_used_before_is_handed_out_clean() -> None:
    """Decoding multiplies the rows behind a context by zero, which a NaN left there would survive."""
    cache = PagedCache(2, 3, 1, 4, torch.float32, torch.device("cpu"))
    first = Sequence()
    batch = cache.batch([(first, 4, False)])
    cache.write(1, batch.rows_T, torch.full((4, 3), float("nan")))
    cache.release(first)
    (span,) = cache.batch([(Sequence(), 1, False)]).spans
    assert torch.equal(cache.read(1, span.rows), torch.zeros(4, 3))


def test_no_page_left_is_named() -> None:
    cache = PagedCache(1, 3, 2, 4, torch.float32, torch.device("cpu"))
    with pytest.raises(
        CapacityOverflow, match="a sequence of 9 tokens needs 3 more pages of 4 tokens, 2 of 2 are free"
    ):
        cache.batch([(Sequence(), 9, False)])
