"""Random splits of rows into three parts."""

import torch
from torch import Tensor

__all__ = ["PARTS", "split_rows"]

PARTS = ("train", "validation", "test")


def split_rows(rows: int, test: float, validation: float, seed: int, what: str = "row") -> dict[str, Tensor]:
    """Return the positions of the rows of each part, int64.

    Args:
        rows: number of rows.
        test: fraction of all rows to test on.
        validation: fraction of all rows for validation.
        seed: of the split.
        what: name of a row in error messages.

    Raises:
        ValueError: the fractions are negative, or leave no train row.

    Example:
        >>> [len(part) for part in split_rows(10, test=0.2, validation=0.1, seed=0).values()]
        [7, 1, 2]
    """
    if not (test >= 0 and validation >= 0 and test + validation < 1):
        raise ValueError(
            f"expected fractions test and validation of at least 0, together below 1; got {test!r} and {validation!r}"
        )
    tested, held_out = round(test * rows), round(validation * rows)
    trained = rows - tested - held_out
    if trained < 1:
        raise ValueError(f"expected fractions that leave a train {what}; got {test!r} and {validation!r} of {rows}")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return dict(zip(PARTS, order.split([trained, held_out, tested]), strict=True))
