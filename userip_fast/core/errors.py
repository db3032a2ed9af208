"""What goes wrong, by name.

Every message names the argument (or file, row and column), the rule, the value, and what to do.
"""

from __future__ import annotations

_LONGEST = 200  # characters of a value in a message


class UserIPError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it without a traceback."""


class DataError(UserIPError, ValueError):
    """Input data breaks a rule: missing column, unknown item, empty text, NaN rating, ..."""


class ConfigError(UserIPError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class FormatError(UserIPError, ValueError):
    """A file (model, bank, checkpoint) is torn, altered, of another version or not ours."""


class MismatchError(UserIPError, ValueError):
    """Two things do not belong together: model and template, codebook and LM, key types."""


class UnsupportedError(UserIPError, ValueError):
    """The LM or the request has a property this package does not support, named in the text."""


class UnavailableError(UserIPError, RuntimeError):
    """An optional part asked for by name (library, compiled extension, device) is not there."""


class StorageError(UserIPError, OSError):
    """The disk is full, read-only or failing; what was there before is untouched."""


class OutOfMemoryError(UserIPError, MemoryError):
    """A step ran out of memory, and no smaller pack can help."""


def shown(value: object) -> str:
    """A value in a message: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"
