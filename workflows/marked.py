"""Pages of which a part is written by a script."""


def between(page: str, begin: str, end: str, part: str) -> str:
    """The page with `part` between two markers; raises ValueError where they are not there once."""
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(
            f"the page needs one {begin} and after it one {end}: it has no part from one to the "
            "other to fill"
        )
    before, rest = page.split(begin)
    return f"{before}{begin}{part}{end}{rest.split(end)[1]}"
