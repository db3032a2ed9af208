"""Profile fields: which traits are looked for, in what words, by how many codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from userip_fast.core.errors import ConfigError


@dataclass(frozen=True)
class ProfileField:
    """One latent trait of a user.

    Args:
        name: Short name, used in files and tables ("hobby").
        prompt: Text before the soft rows ("The user's hobby is"); may be empty.
        num_virtual_tokens: m, soft rows of this field.
        codebook_size: K_j, number of codes.
        candidates: Words that say what values the trait may take. Their embeddings tell the E-step
        in
            which region of the embedding space to start.

    Raises:
        ConfigError: A value breaks the rules above.
    """

    name: str
    prompt: str
    num_virtual_tokens: int = 1
    codebook_size: int = 16
    candidates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not self.name.isidentifier():
            raise ConfigError(f"field name must be an identifier such as 'hobby', is {self.name!r}")
        if self.num_virtual_tokens < 1:
            raise ConfigError(
                f"num_virtual_tokens of field {self.name!r} must be at least 1, is "
                f"{self.num_virtual_tokens}"
            )
        if not 1 <= self.codebook_size < 2**32 - 1:
            raise ConfigError(
                f"codebook_size of field {self.name!r} must be at least 1, is {self.codebook_size}"
            )


def _fields(*rows: tuple[str, str, int, str]) -> tuple[ProfileField, ...]:
    return tuple(
        ProfileField(name, prompt, codebook_size=k, candidates=tuple(words.split()))
        for name, prompt, k, words in rows
    )


TEMPLATES: Mapping[str, tuple[ProfileField, ...]] = {
    "generic": _fields(("taste", "The user's taste is", 16, "")),
    "paper": _fields(
        ("hobby", "The user's hobby is", 4, "sports music reading travel cooking games art nature"),
        ("background", "The user's background is", 3, "student worker parent retired artist"),
    ),
    "books": _fields(
        (
            "genre",
            "The reader's favourite genre is",
            16,
            "fantasy romance thriller classics history science comics poetry young-adult horror",
        ),
        ("critic", "As a critic the reader is", 4, "harsh mild generous"),
    ),
    "movies": _fields(
        (
            "genre",
            "The viewer's favourite genre is",
            16,
            "Action Comedy Drama Horror Romance Thriller Animation Crime Documentary Fantasy",
        ),
        ("critic", "As a critic the viewer is", 4, "harsh mild generous"),
    ),
    "grocery": _fields(
        (
            "household",
            "The shopper's household is",
            16,
            "FRESH FROZEN BABY PET SNACKS MEAT VEGETABLES DAIRY BEVERAGES CANDY",
        ),
        ("style", "The shopper's style is", 8, "SAVER PREMIUM QUICK COOK"),
    ),
    "gifts": _fields(
        (
            "occasion",
            "The customer buys for",
            16,
            "CHRISTMAS KITCHEN GARDEN CHILDREN PARTY HOME VINTAGE JEWELLERY BAGS CARDS",
        ),
        ("style", "The customer's style is", 8, "RETRO ELEGANT CUTE PLAIN"),
    ),
}
"""Ready-made sets of fields, by name (`--template`)."""
