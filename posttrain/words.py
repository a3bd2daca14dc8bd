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


def counted(number: float, noun: str) -> str:
    """Write a number with commas and the noun that it counts.

    >>> counted(1, "document"), counted(14_880, "token"), counted(0.5, "epoch"), counted(2, "row of 5")
    ('1 document', '14,880 tokens', '0.5 epochs', '2 rows of 5')
    >>> counted(0, "entry"), counted(3, "day")
    ('0 entries', '3 days')
    """
    head, *rest = noun.split(" ", 1)
    plural = f"{head[:-1]}ies" if head.endswith("y") and head[-2] not in "aeiou" else f"{head}s"
    written = f"{number:,g}" if number != int(number) else f"{int(number):,}"
    return " ".join([written, head if number == 1 else plural, *rest])


def duration(seconds: float) -> str:
    """Write a time as h:mm:ss, or mm:ss under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
