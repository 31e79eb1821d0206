"""The share ρ as it was written, exactly; `topk.count_selected` makes a count of it."""

from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TypeAlias

Rho: TypeAlias = float | str | Decimal


def parse_rho(rho: Rho) -> Fraction:
    """The share ρ as the decimal that was written: 0.1 is 1/10, not the nearest binary number.

    Raises ValueError if ρ is not a decimal in (0, 1] with at most 9 digits after the point.
    """
    try:
        decimal = Decimal(str(rho))
    except InvalidOperation:
        raise ValueError(f"rho={rho!r} is not a number: use the share to keep, as 0.6") from None
    if not (decimal.is_finite() and 0 < decimal <= 1):
        raise ValueError(f"rho={rho} is outside (0, 1]: use the share to keep, as 0.6")
    share = Fraction(decimal)
    if 10**9 % share.denominator:
        raise ValueError(f"rho={rho} has more than 9 decimals: round it to 9 or fewer")
    return share
