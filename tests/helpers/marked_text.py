"""Wrong files with marks at the places that their messages point at."""

HERE = "«"  # one mark per message


def unmarked(text: str) -> tuple[str, list[str]]:
    """A file without its marks, and the `line:column` of each mark."""
    plain, *pieces = text.split(HERE)
    positions = []
    for piece in pieces:
        positions.append(f"{plain.count(chr(10)) + 1}:{len(plain) - plain.rfind(chr(10))}")
        plain += piece
    return plain, positions
