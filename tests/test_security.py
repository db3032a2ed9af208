"""What must never be in the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "userip_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]

# The reader of one foreign format, whose unpickler refuses everything but plain values.
PLAIN_UNPICKLER = ROOT / "userip_fast" / "data" / "nete.py"


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_unpickled_and_nothing_is_executed():
    """By any name under which Python, torch or numpy would do it."""
    banned = {
        "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "eval",
        "exec", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "yaml.load",
        "yaml.unsafe_load", "yaml.full_load", "dist.all_gather_object", "os.system",
        "dist.broadcast_object_list", "pd.read_pickle",
    }  # fmt: skip
    assert len(SOURCES) > 60
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for name, node in calls(tree):
            assert name not in banned, f"{path}:{node.lineno}: {name}"
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                what = f"{path}:{node.lineno}: {keyword.arg}"
                assert not (on and keyword.arg in ("allow_pickle", "trust_remote_code")), what
                assert not (on and keyword.arg == "shell"), what
        imports = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert path == PLAIN_UNPICKLER or not imports & {"pickle", "marshal", "dill", "shelve"}, (
            path
        )
