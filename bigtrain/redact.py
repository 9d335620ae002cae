"""Secrets out of text that is kept or shown: run directories and reports end up in shared folders."""

from __future__ import annotations

import re

# A value after a key such as wandb_api_key= or --password, and the user part of https://name:secret@host.
_SECRET = re.compile(
    r"(?i)(\b[\w.-]*(?:api[_-]?key|secret|passw(?:or)?d|credential|(?:access|auth|hf|api)[_-]?token)\w*(?:=|\s+))"
    r"(?:'[^']*'|\S+)"
)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def redacted(command: str) -> str:
    """The command line with the values of keys, tokens and passwords replaced by ***."""
    return _URL_LOGIN.sub("***@", _SECRET.sub(r"\1***", command))
