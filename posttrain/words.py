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


def counted(number: int, noun: str) -> str:
    """Write so many things.

    >>> counted(1, "document"), counted(14_880, "document"), counted(0, "entry")
    ('1 document', '14,880 documents', '0 entries')
    """
    plural = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """Write a time as h:mm:ss, or mm:ss under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
