"""The way of a log through `fit`: docs/design.md tells it, and it stays short.

A stop is a file in which a function is handed the log (methods of the log itself aside), a climb a
step to a file of a folder further down in the drawing of docs/design.md. Run as a script, this
prints the way.
"""

import sys
from itertools import pairwise
from pathlib import Path

import small_log
from test_layers import PACKAGE, drawn

MOST_STOPS, MOST_CLIMBS = 10, 2


def way_of(log, run):
    """(file, function) of the package that hold a log as an argument, as they are called."""
    seen = []

    def note(frame, event, arg):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) for name in names if name not in ("self", "cls")]
        if any(isinstance(x, type(log)) for x in given):
            seen.append((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_name))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def stops(way):
    return [f for i, (f, _) in enumerate(way) if i == 0 or way[i - 1][0] != f]


def climbs(files):
    place = [drawn().index(Path(f).parts[0].removesuffix(".py")) for f in files]
    return sum(b > a for a, b in pairwise(place))


def a_way(folder):
    from userip_fast import Config, fit, read_interactions

    log, items = small_log.tables()
    data = read_interactions(log, items, rating="rating", time="timestamp")
    config = Config().override({"em.rounds": 1} | dict(s.split("=") for s in small_log.TINY))
    return way_of(data, lambda: fit(data, config=config, out=folder / "run", show=False))


def test_a_log_goes_straight(tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    way = a_way(tmp_path)
    assert ("jobs/fit.py", "fit") in way
    assert ("prompts/format.py", "events") in way
    assert len(stops(way)) <= MOST_STOPS, way
    assert climbs(stops(way)) <= MOST_CLIMBS, way


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = a_way(Path(folder))
    print("\n".join(f"{file}: {function}" for file, function in found))
    print(f"{len(stops(found))} stops, {climbs(stops(found))} climbs")
