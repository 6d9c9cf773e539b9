"""Numbers as people read them."""


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in two figures or so.

    Examples:
        >>> duration(4.2), duration(95), duration(3000), duration(9000), duration(4e5)
        ('4 s', '1 min 35 s', '50 min', '2 h 30 min', '111 h')
    """
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s".removesuffix(" 0 s")
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min".removesuffix(" 0 min") if minutes < 1440 else f"{minutes // 60} h"


def size(count: float) -> str:
    """Bytes in MiB, or in GiB.

    Examples:
        >>> size(3 * 2**20), size(1.5 * 2**30)
        ('3 MiB', '1.5 GiB')
    """
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
