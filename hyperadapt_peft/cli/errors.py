"""The one exception a user's mistake ends in, and how it names what was meant."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class RecipeError(ValueError):
    """A recipe that cannot be run; its message is one line that starts with the key."""


def suggestion(word: str, options: Iterable[str]) -> str:
    """The hint that ends a message: the option most like `word`, or nothing when there are no options."""
    names = {name.lower(): name for name in options}
    matches = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0)
    return f"; the nearest valid name is '{names[matches[0]]}'" if matches else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def errors_about(key: str, source: str | None = None, *more: type[Exception]) -> Iterator[None]:
    """What a library raises inside this context becomes a RecipeError about `key`.

    Args:
        key: what the message starts with.
        source: the Hub id or the local path that is being loaded, if any.
        more: errors that are the user's here, beside those that libraries have for wrong values and files.
    """
    expected: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, ImportError, *more)
    try:
        yield
    except RecipeError:
        raise
    except expected as error:
        hint = "" if source is None or Path(source).exists() else "; a local directory works too"
        raise RecipeError(f"{key}: {first_line(error).rstrip('.')}{hint}") from error
