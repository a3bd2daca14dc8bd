"""Numbers and times as people read them."""


def human(number: float) -> str:
    """Write a number with three digits and a suffix.

    >>> human(1_234), human(12.5), human(8.03e9)
    ('1.23k', '12.5', '8.03B')
    """
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Write a time as h:mm:ss, or mm:ss under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
