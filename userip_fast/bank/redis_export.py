"""A bank in Redis, for online stores: one key per user, and one pointer that switches versions.

    NS:current          the version that readers use, a string
    NS:VERSION:about    JSON: fields, code dtype, model fingerprint, number of users, digest
    NS:VERSION:u:KEY    the user's J codes, little-endian, in the bank's own type; on request behind
                        them sum of K_j float16: the probabilities of all codes, field after field
    NS:VERSION:t:KEY    on request the user's best items, JSON: [[item, score], ...], best first

All users of a version are written, in pipelines, before NS:current names it: a reader sees one
version or the other. An export that was cut off leaves the pointer alone; run again, it writes the
same keys. `about` is the first key of a version to be written and the last to be removed, so that
no key of another bank is left under a name that is used again; while users are removed it is `{}`.
A reader that keeps a version asks for the start of its `about` and for users in one transaction.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.bank.checks import Field, check_fields, code_dtype
from userip_fast.bank.index import ON_UNKNOWN, bad_on_unknown, keys_of_type, unknown_users
from userip_fast.bank.parquet import Best, no_profiles
from userip_fast.core.errors import (
    ConfigError,
    FormatError,
    MismatchError,
    UnavailableError,
    UserIPError,
)

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DATABASE = re.compile(r"(/[0-9]*)?")
_SCHEMES = ("redis", "rediss", "unix")
_HEAD = 96  # bytes of `about`, which hold the bank's digest


def connect(url: str, timeout_s: float = 10.0) -> Any:
    """A Redis client.

    Args:
        url: `redis://[user:password@]host[:port][/db]`, `rediss://` (TLS) or `unix:///socket`.
        timeout_s: To connect, and of each command.

    Raises:
        ConfigError: Not such a URL. Messages never hold user, password or query.
        UnavailableError: The package `redis` is not installed, or there is no such server.
    """
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError("the Redis URL cannot be parsed") from None
    where_ok = parts.path not in ("", "/") if parts.scheme == "unix" else bool(parts.hostname)
    if parts.scheme not in _SCHEMES or not where_ok or not port_ok:
        raise ConfigError(
            "the Redis URL must be redis://[user:password@]host[:port][/db], rediss://... or "
            f"unix:///path, is {redacted(url)!r} (without what may be secret)"
        )
    try:
        import redis
    except ImportError as e:
        raise UnavailableError("Redis needs the client: pip install redis") from e
    with _told(url):
        client = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        )
        client.ping()
    return client


def redacted(url: str) -> str:
    """The URL without user, password, query and fragment; "..." where these cannot be told apart,
    as without a scheme or where a password holds a slash.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "..."
    plain = parts.scheme == "unix" or _DATABASE.fullmatch(parts.path)
    misread = "@" in parts.path + parts.query + parts.fragment
    if parts.scheme not in _SCHEMES or misread or not plain:
        return "..."
    return f"{parts.scheme}://{host}{port}{parts.path}"


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turns the client's errors into ours."""
    import redis

    try:
        yield
    except UserIPError:
        raise
    except redis.AuthenticationError:
        raise UnavailableError(f"{redacted(url)}: Redis refuses user or password") from None
    except (redis.RedisError, OSError, ValueError) as e:
        # The cause is kept to its class: its text may hold the URL.
        raise UnavailableError(
            f"{redacted(url)}: Redis is not reachable or refuses ({type(e).__name__}); readers "
            "still see the version from before. Run the export again once it is back"
        ) from None


def export_redis(
    bank: FeatureBank,
    url: str,
    *,
    namespace: str = "userip",
    version: str | None = None,
    batch: int = 10_000,
    keep: int = 2,
    probabilities: bool = False,
    best: Best | None = None,
) -> str:
    """Writes a bank to Redis and points readers to it.

    Args:
        url: See `connect`.
        namespace: Prefix of all keys.
        version: Name of this version; None takes it from the generation and the model. A name used
            before is cleared of another bank's users first.
        batch: Users per pipeline.
        keep: Versions to keep, this one included; keys of older ones are removed.
        probabilities: Whether to write the probabilities of all codes too.
        best: Users' best items, `Server.best_items(n)`, to write too.

    Returns:
        The version.

    Raises:
        ConfigError: A bad URL, namespace or version; or readers use a version of that name, and it
            is of another bank; or `probabilities` or `best`, and the bank has no profiles.
        UnavailableError: Redis went away; the pointer is where it was.
    """
    profiles = bank.profiles
    if profiles is None and (probabilities or best is not None):
        raise no_profiles(bank.path)
    digest = _digest(bank, probabilities, best)
    if version is None:
        version = f"{bank.info()['generation']}-{bank.model_fingerprint[:12]}"
        if digest != bank.digest:  # beside the codes alone
            version += f"-{digest[:8]}"
    for name, value in (("namespace", namespace), ("version", version)):
        if not _NAMESPACE.fullmatch(value):
            raise ConfigError(f"{name}={value!r}: must be 1 to 64 of A-Z a-z 0-9 _ . -")
    if batch < 1 or keep < 1:
        raise ConfigError(f"batch and keep must be positive, are {batch} and {keep}")
    client = connect(url)
    prefix = f"{namespace}:{version}"
    about = {
        "digest": digest,  # first: readers know their version by it
        "fields": bank.fields,
        "dtype": bank.codes().dtype.str,
        "key_type": bank.key_type,
        "users": len(bank),
        "model_fingerprint": bank.model_fingerprint,
        "probabilities": probabilities,
        "best": best is not None,
    }
    keys, codes = bank.keys(), np.ascontiguousarray(bank.codes())
    with _told(url):
        before = client.get(f"{prefix}:about")
        if before and json.loads(before).get("digest") != digest:
            if client.get(f"{namespace}:current") == version.encode():
                raise ConfigError(
                    f"version={version!r}: readers use a version of that name, of another bank; "
                    "choose another name, readers change over to it by themselves"
                )
            _remove(client, namespace, version)
        client.set(f"{prefix}:about", json.dumps(about))
        for start in range(0, len(bank), batch):
            part = keys.slice(start, batch).to_pylist()
            rows = slice(start, start + batch)
            told = [row.tobytes() for row in codes[rows]]
            if probabilities and profiles is not None:
                told = [a + row.tobytes() for a, row in zip(told, profiles[rows])]
            pipeline = client.pipeline(transaction=False)
            pipeline.mset({f"{prefix}:u:{k}": value for k, value in zip(part, told)})
            if best is not None and profiles is not None:
                lists = (x.tolist() for x in best(profiles[rows].astype(np.float32)))
                texts = [json.dumps(list(zip(*own))) for own in zip(*lists)]
                pipeline.mset({f"{prefix}:t:{k}": text for k, text in zip(part, texts)})
            pipeline.execute()
        pipeline = client.pipeline(transaction=True)
        pipeline.set(f"{namespace}:current", version)
        pipeline.lrem(f"{namespace}:versions", 0, version)
        pipeline.lpush(f"{namespace}:versions", version)
        pipeline.execute()
        for old in client.lrange(f"{namespace}:versions", keep, -1):
            _remove(client, namespace, old.decode())
    return version


def _digest(bank: FeatureBank, probabilities: bool, best: Best | None) -> str:
    """Of what is written: of the bank, where it is the codes alone, as ever."""
    if not probabilities and best is None:
        return bank.digest
    asked = b"probabilities" * probabilities
    if best is not None:  # what is said of anybody says which items there are
        size = sum(field["codebook_size"] for field in bank.fields)
        items, scores = best(np.full((1, size), 1 / size, np.float32))
        asked += repr(items.tolist()).encode() + scores.tobytes()
    return hashlib.sha256(bank.digest.encode() + asked).hexdigest()


def _remove(client: Any, namespace: str, version: str) -> None:
    """Removes a version's users, then what names it: an interrupted removal is taken up again.

    Before the first user goes `about` is emptied: readers then know that their version is gone.
    """
    client.set(f"{namespace}:{version}:about", "{}", xx=True)
    found = []
    for key in client.scan_iter(match=f"{namespace}:{version}:[ut]:*", count=10_000):
        found.append(key)
        if len(found) == 10_000:
            client.unlink(*found)
            found.clear()
    if found:
        client.unlink(*found)
    client.unlink(f"{namespace}:{version}:about")
    client.lrem(f"{namespace}:versions", 0, version)


@dataclass(frozen=True)
class _Version:
    """What `about` says of a version, and how that text begins: with the bank's digest."""

    name: str
    fields: list[Field]
    model_fingerprint: str
    key_type: str | None
    dtype: np.dtype[Any]
    probabilities: bool
    best: bool
    head: bytes

    @property
    def width(self) -> int:
        """Bytes of a user."""
        sizes = [field["codebook_size"] for field in self.fields]
        return int(self.dtype.itemsize * len(sizes) + 2 * sum(sizes) * self.probabilities)


class RedisBank:
    """Looks users up in Redis as `FeatureBank.lookup` does in a bank; shows how any reader may.

    The version is read when this is made, and `refresh` turns to the one that is current now. So
    does a look-up that finds its version gone, as long as model and fields are the same.

    Args:
        url: See `connect`.
        namespace: As given to `export_redis`.

    Attributes:
        version: Name of the version in use.
        fields, model_fingerprint: As of the bank.

    Raises:
        FormatError: No bank was exported under this namespace.
        ConfigError, UnavailableError: See `connect`.
    """

    def __init__(self, url: str, namespace: str = "userip") -> None:
        self._url, self._namespace = url, namespace
        self._where = f"{redacted(url)}, {namespace}"
        self._client = connect(url)
        self.refresh()

    def refresh(self) -> None:
        """Turns to the current version.

        Raises:
            FormatError: No bank was exported under this namespace.
        """
        self._use(self._current())

    def lookup(self, user_ids: Any, on_unknown: str = "error") -> NDArray[np.int64]:
        """[n, J] codes; see `FeatureBank.lookup`.

        Raises:
            ConfigError, DataError, KeyTypeError: As there.
            MismatchError: The version in use is gone, and the current one is of another model or
                has other fields.
            FormatError: A user's value is damaged.
            UnavailableError: Redis went away.
        """
        at, keys, told = self._read(user_ids, on_unknown)
        sizes = np.array([field["codebook_size"] for field in at.fields])
        width = at.dtype.itemsize * len(sizes)
        reserved = sizes.astype(at.dtype).tobytes()
        packed = b"".join(reserved if value is None else value[:width] for value in told)
        codes = np.frombuffer(packed, at.dtype).reshape(len(keys), len(sizes)).astype(np.int64)
        bad = (codes >= sizes).any(1) & np.array([value is not None for value in told], bool)
        if bad.any():
            raise FormatError(
                f"{self._where}: version {at.name} holds {codes[bad][0].tolist()} for user "
                f"{keys[int(bad.argmax())].as_py()!r}, must be below {sizes.tolist()}; export the "
                "bank again"
            )
        return codes

    def lookup_profiles(self, user_ids: Any, on_unknown: str = "error") -> NDArray[np.float32]:
        """[n, sum of K_j] probabilities of all codes; see `FeatureBank.lookup_profiles`.

        Raises:
            ConfigError: They were not exported; or as `lookup`, as all else.
        """
        at, keys, told = self._read(user_ids, on_unknown, need="probabilities")
        total = sum(field["codebook_size"] for field in at.fields)
        nobody = bytes(2 * total)
        packed = b"".join(nobody if value is None else value[-2 * total :] for value in told)
        p = np.frombuffer(packed, "<f2").reshape(len(keys), total).astype(np.float32)
        if (bad := ~((p >= 0) & (p <= 1)).all(1)).any():
            raise FormatError(
                f"{self._where}: version {at.name} holds no probabilities for user "
                f"{keys[int(bad.argmax())].as_py()!r}; export the bank again"
            )
        return p

    def top_items(self, user_ids: Any, on_unknown: str = "error") -> list[list[tuple[Any, float]]]:
        """Per user the best items that were exported, (key, score), best first; none of a user who
        is not there.

        Raises:
            ConfigError: They were not exported; or as `lookup`, as all else.
        """
        at, keys, told = self._read(user_ids, on_unknown, need="best", kind="t")
        try:
            return [[] if v is None else [(k, float(s)) for k, s in json.loads(v)] for v in told]
        except (TypeError, ValueError) as e:
            raise FormatError(
                f"{self._where}: version {at.name} holds no list of items for one of "
                f"{len(keys)} users ({e!r}); export the bank again"
            ) from e

    def _read(
        self, user_ids: Any, on_unknown: str, need: str = "", kind: str = "u"
    ) -> tuple[_Version, pa.Array, list[bytes | None]]:
        """The version, keys, and of each what is stored, None where nothing is."""
        if on_unknown not in ON_UNKNOWN:
            raise bad_on_unknown(on_unknown)
        while True:
            at = self._at
            if need and not getattr(at, need):
                raise ConfigError(
                    f"{self._where}: version {at.name} was exported without {need}; export the "
                    f"bank with {need}="
                )
            keys = keys_of_type("user_ids", user_ids, at.key_type, self._where)
            if (told := self._values(keys, kind)) is not None:
                break
            new = self._current()
            if (new.model_fingerprint, new.fields) != (at.model_fingerprint, at.fields):
                raise MismatchError(
                    f"{self._where}: version {at.name} is gone, and {new.name} is of another model "
                    "or has other fields; make a new RedisBank for readers of its codes"
                )
            self._use(new)
        unknown = [value is None for value in told]
        if any(unknown) and on_unknown == "error":
            raise unknown_users(keys.filter(pa.array(unknown)), len(keys), self._where)
        for i, value in enumerate(told):
            if kind == "u" and value is not None and len(value) != at.width:
                raise FormatError(
                    f"{self._where}: version {at.name} holds {len(value)} bytes for user "
                    f"{keys[i].as_py()!r}, must be {at.width}; export the bank again"
                )
        return at, keys, told

    def _values(self, keys: pa.Array, kind: str) -> list[bytes | None] | None:
        """What is stored for users; None where the version in use is gone, or going."""
        prefix = f"{self._namespace}:{self.version}"
        if len(keys) == 0:
            return []
        with _told(self._url):
            both = self._client.pipeline(transaction=True)
            both.getrange(f"{prefix}:about", 0, len(self._at.head) - 1)
            both.mget([f"{prefix}:{kind}:{key}" for key in keys.to_pylist()])
            head, found = both.execute()
        values: list[bytes | None] = found
        return values if head == self._at.head else None

    def _current(self) -> _Version:
        with _told(self._url):
            name = self._client.get(f"{self._namespace}:current")
            about = name and self._client.get(f"{self._namespace}:{name.decode()}:about")
        if not about:
            raise FormatError(f"{redacted(self._url)}: holds no bank named {self._namespace!r}")
        try:
            values = json.loads(about)
            return _Version(
                name.decode(),
                check_fields(values["fields"]),
                str(values["model_fingerprint"]),
                str(values["key_type"]) if values["users"] else None,
                code_dtype(values["fields"]),
                bool(values.get("probabilities")),  # versions of before tell neither
                bool(values.get("best")),
                about[:_HEAD],
            )
        except (KeyError, TypeError, ValueError) as e:
            raise FormatError(
                f"{self._where}: version {name.decode()} is damaged ({e!r}); export the bank again"
            ) from e

    def _use(self, version: _Version) -> None:
        self._at = version
        self.version, self.fields = version.name, version.fields
        self.model_fingerprint = version.model_fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._url, self._namespace, self._at)


def _reopened(url: str, namespace: str, version: _Version) -> RedisBank:
    """A reader in another process, of the same version."""
    bank = RedisBank(url, namespace)
    bank._use(version)
    return bank
