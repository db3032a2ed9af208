"""What the LM is told: the layout of a prompt, events as text and tokens, packs of users."""

from userip_fast.core.deprecated import names_of

__getattr__ = names_of(__name__)
