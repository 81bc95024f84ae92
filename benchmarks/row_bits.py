"""Do a row's bits depend on how many rows are multiplied with it? What crossdock/linear.py is built on, measured here.

    python benchmarks/row_bits.py

For each inner size K: how many of the row counts 1 to 64 give some row other bits than the product of 72 rows does, by
F.linear as it is and by crossdock.linear, in float32 and bfloat16, with one thread and with two.
"""

import torch
import torch.nn.functional as F

from crossdock.linear import linear

SIZES = [(33, 6), (40, 64), (64, 97), (128, 256), (192, 384), (256, 768), (1024, 512), (2048, 1024)]


def differing(product: object, k: int, n: int, dtype: torch.dtype) -> int:
    """Of the row counts 1 to 64, how many change a bit of any row."""
    assert callable(product)
    x_MK, w_NK = torch.randn(72, k).to(dtype), torch.randn(n, k).to(dtype)
    whole_MN = product(x_MK, w_NK)
    return sum(not torch.equal(product(x_MK[:m], w_NK), whole_MN[:m]) for m in range(1, 65))


def main() -> None:
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; row counts of 64 that change bits")
    print(f"{'K x N':>12} {'threads':>8} {'dtype':>9} {'F.linear':>9} {'crossdock':>10}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for k, n in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(0)
                found = [differing(product, k, n, dtype) for product in (F.linear, linear)]
                print(f"{f'{k} x {n}':>12} {threads:>8} {str(dtype)[6:]:>9} {found[0]:>9} {found[1]:>10}")


if __name__ == "__main__":
    main()
