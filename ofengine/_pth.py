# The text of ofengine.pth, which setup.py puts into site-packages: Python runs it at every
# start, before any import. It makes OneFlow's import a quiet one even where OneFlow or
# flowvision is imported before ofengine. So that nobody pays for it, it only waits for the
# name "oneflow"; so that it never breaks a Python, it stays silent if ofengine is gone.
import sys


class OFEnginePth:
    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
        if name != "oneflow":
            return None
        try:
            sys.meta_path.remove(cls)  # type: ignore[arg-type]
            from ofengine._startup import OneFlowFinder

            return OneFlowFinder.find_spec(name)
        except Exception:
            return None


sys.meta_path.insert(0, OFEnginePth)  # type: ignore[arg-type]
