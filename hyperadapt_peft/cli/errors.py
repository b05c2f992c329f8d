"""The one exception a user's mistake ends in, and how it names what was meant."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class RecipeError(ValueError):
    """A recipe that cannot be run; its message is one line that starts with the key."""


def nearest(word: str, options: Iterable[str]) -> str:
    """The hint that ends a message: the option most like `word`, or nothing when there are no options."""
    names = {name.lower(): name for name in options}
    matches = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0)
    return f"; the nearest valid name is '{names[matches[0]]}'" if matches else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def attempt(key: str, load: Callable[[], Any]) -> Any:
    """What `load` returns; what a library says when it cannot becomes a RecipeError about `key`."""
    try:
        return load()
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"{key}: {first_line(error)}") from error
