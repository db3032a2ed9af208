"""A bank in Redis, for online stores: one key per user, and one pointer that switches versions.

    NS:current          the version that readers use, a string
    NS:VERSION:about    JSON: fields, code dtype, model fingerprint, number of users, digest
    NS:VERSION:u:KEY    the user's J codes, little-endian, in the bank's own type

All users of a version are written, in pipelines, before NS:current names it: a reader sees one
version or the other. An export that was cut off leaves the pointer alone; run again, it writes the
same keys. `about` is the first key of a version to be written and the last to be removed, so that
no key of another bank is left under a name that is used again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from userip_fast.bank.layout import Field
from userip_fast.errors import (
    ConfigError,
    DataError,
    FormatError,
    UnavailableError,
    UserIPError,
)

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SCHEMES = ("redis", "rediss", "unix")


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
            f"the Redis URL must be redis://[user:password@]host[:port][/db], rediss://... or "
            f"unix:///path, is {redacted(url)!r}"
        )
    try:
        import redis
    except ImportError as e:
        raise UnavailableError("Redis needs the client: pip install 'userip-fast[redis]'") from e
    with _told(url):
        client = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        )
        client.ping()
    return client


def redacted(url: str) -> str:
    """The URL without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
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
    except redis.AuthenticationError as e:
        raise UnavailableError(f"{redacted(url)}: Redis refuses user or password") from e
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
) -> str:
    """Writes a bank to Redis and points readers to it.

    Args:
        url: See `connect`.
        namespace: Prefix of all keys.
        version: Name of this version; None takes it from the generation and the model. A name used
            before is cleared of another bank's users first.
        batch: Users per pipeline.
        keep: Versions to keep, this one included; keys of older ones are removed.

    Returns:
        The version.

    Raises:
        ConfigError: A bad URL, namespace or version; or readers use a version of that name, and it
            is of another bank.
        UnavailableError: Redis went away; the pointer is where it was.
    """
    if version is None:
        version = f"{bank.info()['generation']}-{bank.model_fingerprint[:12]}"
    for name, value in (("namespace", namespace), ("version", version)):
        if not _NAMESPACE.fullmatch(value):
            raise ConfigError(f"{name}={value!r}: must be 1 to 64 of A-Z a-z 0-9 _ . -")
    if batch < 1 or keep < 1:
        raise ConfigError(f"batch and keep must be positive, are {batch} and {keep}")
    client = connect(url)
    prefix = f"{namespace}:{version}"
    about = {
        "fields": bank.fields,
        "dtype": bank.codes().dtype.str,
        "key_type": bank.key_type,
        "users": len(bank),
        "model_fingerprint": bank.model_fingerprint,
        "digest": bank.digest,
    }
    keys, codes = bank.keys(), np.ascontiguousarray(bank.codes())
    width = codes.itemsize * codes.shape[1]
    with _told(url):
        before = client.get(f"{prefix}:about")
        if before and json.loads(before).get("digest") != bank.digest:
            if client.get(f"{namespace}:current") == version.encode():
                raise ConfigError(
                    f"version={version!r}: readers use a version of that name, of another bank; "
                    "choose another name, readers change over to it by themselves"
                )
            _remove(client, namespace, version)
        client.set(f"{prefix}:about", json.dumps(about))
        for start in range(0, len(bank), batch):
            part = keys.slice(start, batch).to_pylist()
            packed = codes[start : start + batch].tobytes()
            pipeline = client.pipeline(transaction=False)
            pipeline.mset(
                {f"{prefix}:u:{k}": packed[i * width :][:width] for i, k in enumerate(part)}
            )
            pipeline.execute()
        pipeline = client.pipeline(transaction=True)
        pipeline.set(f"{namespace}:current", version)
        pipeline.lrem(f"{namespace}:versions", 0, version)
        pipeline.lpush(f"{namespace}:versions", version)
        pipeline.execute()
        for old in client.lrange(f"{namespace}:versions", keep, -1):
            _remove(client, namespace, old.decode())
    return version


def _remove(client: Any, namespace: str, version: str) -> None:
    """Removes a version's users, then what names it: an interrupted removal is taken up again."""
    found = []
    for key in client.scan_iter(match=f"{namespace}:{version}:u:*", count=10_000):
        found.append(key)
        if len(found) == 10_000:
            client.unlink(*found)
            found.clear()
    if found:
        client.unlink(*found)
    client.unlink(f"{namespace}:{version}:about")
    client.lrem(f"{namespace}:versions", 0, version)


class RedisBank:
    """Looks users up in Redis as `FeatureBank.lookup` does in a bank; shows how any reader may.

    The version is read when this is made; `refresh` turns to the one that is current now.
    """

    def __init__(self, url: str, namespace: str = "userip") -> None:
        self._url, self._namespace = url, namespace
        self._client = connect(url)
        self.refresh()

    def refresh(self) -> None:
        """Turns to the current version.

        Raises:
            FormatError: No bank was exported under this namespace.
        """
        with _told(self._url):
            version = self._client.get(f"{self._namespace}:current")
            about = version and self._client.get(f"{self._namespace}:{version.decode()}:about")
        if not about:
            raise FormatError(f"{redacted(self._url)}: holds no bank named {self._namespace!r}")
        values = json.loads(about)
        self.version: str = version.decode()
        self.fields: list[Field] = values["fields"]
        self.model_fingerprint: str = values["model_fingerprint"]
        self._dtype = np.dtype(values["dtype"])

    def lookup(self, user_ids: Any, on_unknown: str = "error") -> NDArray[np.int64]:
        """[n, J] codes; see `FeatureBank.lookup`."""
        prefix = f"{self._namespace}:{self.version}:u:"
        users = list(user_ids)
        with _told(self._url):
            found = self._client.mget([f"{prefix}{u}" for u in users]) if users else []
        missing = [u for u, value in zip(users, found) if value is None]
        if missing and on_unknown == "error":
            raise DataError(
                f"user_ids: {len(missing)} of {len(users)} are not in the bank: {missing[:10]}; "
                "on_unknown='code' gives them the reserved code"
            )
        sizes = [field["codebook_size"] for field in self.fields]
        unknown = np.array(sizes, self._dtype).tobytes()
        packed = b"".join(unknown if value is None else value for value in found)
        return np.frombuffer(packed, self._dtype).reshape(len(users), len(sizes)).astype(np.int64)
