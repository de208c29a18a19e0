"""The core knows no framework: it imports where none is installed."""

import pkgutil
import subprocess
import sys

import copris_lightning.core

BLOCKED = (
    "datasets",
    "jsonargparse",
    "lightning",
    "pytorch_lightning",
    "transformers",
    "vllm",
)

SCRIPT = """
import importlib, sys

blocked = set(sys.argv[1].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for name in sorted(blocked):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "is blocked" in str(error), error
    else:
        raise AssertionError(f"{name} came through")
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print(sorted(name for name in sys.modules if name.partition(".")[0] in blocked))
"""


def test_core_imports_without_any_framework():
    package = copris_lightning.core
    names = [
        package.__name__,
        *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")),
    ]
    assert len(names) > 7
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(BLOCKED), ",".join(names)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
