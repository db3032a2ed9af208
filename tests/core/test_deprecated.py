"""What was renamed, moved or dropped still works, and says what it is now."""

import subprocess
import sys
import warnings
from importlib import import_module

import pytest

from userip_fast.core import deprecated
from userip_fast.core.config import Config


@pytest.mark.parametrize("old", sorted(deprecated.MODULES))
def test_a_module_that_moved_is_found_where_it_lies(old):
    new = f"userip_fast.{deprecated.MODULES[old]}"
    try:
        module = import_module(new)
    except ImportError as e:
        pytest.skip(str(e))
    sys.modules.pop(f"userip_fast.{old}", None)
    spec = module.__spec__
    with pytest.warns(DeprecationWarning, match=rf"userip_fast\.{old} is {new} now.* {GONE}"):
        assert import_module(f"userip_fast.{old}") is module
    assert module.__spec__ is spec
    assert module.__name__ == new


GONE = deprecated.GONE_IN.replace(".", r"\.")


@pytest.mark.parametrize("old", sorted(deprecated.NAMES))
def test_a_name_that_moved_is_found_where_it_lies(old):
    holder, _, name = old.rpartition(".")
    new, _, new_name = deprecated.NAMES[old].rpartition(".")
    module, _, cls = holder.partition(".")
    of = import_module(f"userip_fast.{module}")
    of = getattr(of, cls) if cls else of
    with pytest.warns(DeprecationWarning, match=rf"userip_fast\.{old} is .* now.* {GONE}"):
        found = getattr(of, name)
    assert found is getattr(import_module(f"userip_fast.{new}"), new_name)


def test_the_warning_points_at_who_uses_the_old_name():
    code = "import userip_fast\nfrom userip_fast.config import Config\n"
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    assert "<string>:2: DeprecationWarning: userip_fast.config is" in run.stderr


def test_other_names_are_still_unknown():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = import_module("userip_fast.codebook").nothing
    with pytest.raises(ModuleNotFoundError):
        import_module("userip_fast.nothing")


def test_settings_of_before_are_read():
    """Those that were as by default in silence, as every model folder has them."""
    saved = Config().to_dict()
    saved["em"] |= deprecated_defaults()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Config.from_dict(saved) == Config()
    saved["em"]["refine_steps"] = 2
    with pytest.warns(DeprecationWarning, match=f"em.refine_steps=2 is passed over.* {GONE}"):
        assert Config.from_dict(saved) == Config()
    with pytest.warns(DeprecationWarning, match="em.commitment=0.5 is passed over"):
        assert Config().override({"em.commitment": 0.5}) == Config()
    with pytest.warns(DeprecationWarning, match="em.start=behaviour is taken for auto"):
        assert Config().override({"em.start": "behaviour"}) == Config()


def deprecated_defaults():
    return {name.partition(".")[2]: value for name, value in deprecated.SETTINGS.items()}
