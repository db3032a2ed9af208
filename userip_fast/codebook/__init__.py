"""Codewords, the nearest of them, and names of codes."""

from userip_fast.core.deprecated import names_of

__getattr__ = names_of(__name__)
