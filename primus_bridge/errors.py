"""The one error a user can cause: what is wrong, where, and how to mend it, in one message."""

from __future__ import annotations


class ConfigError(ValueError):
    """Something the user gave is wrong (a key, a file, a layout, a sample).

    The command line prints it as one message on stderr and exits with code 2, without a traceback.
    ``where`` is a place a user can open: ``file:line``, a key, a folder.
    """

    def __init__(self, message: str, *, where: str | None = None):
        self.message = message
        self.where = where
        super().__init__(f"{where}: {message}" if where else message)


def did_you_mean(word: str, known) -> str:
    """`` - did you mean 'lora_rank'?`` for the nearest known word, or an empty string."""
    import difflib

    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f" - did you mean '{near[0]}'?" if near else ""
