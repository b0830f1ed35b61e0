"""What setup.cfg cannot say: a clear word on the wrong Python, and ofengine.pth."""

import os
import sys
from typing import Dict, List

if not (3, 8) <= sys.version_info[:2] <= (3, 10):
    here = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        "ofengine needs CPython 3.8, 3.9 or 3.10, because OneFlow 0.9 has no wheel for newer ones; "
        f"this is {here}. Install python3.10, for instance with pyenv or uv, and try again with it."
    )

from setuptools import Command, setup
from setuptools.command.build import build

SOURCE = os.path.join("ofengine", "_pth.py")


class build_pth(Command):
    """Write ofengine.pth beside the package, in wheels and in editable installs."""

    editable_mode = False  # setuptools sets it

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        with open(SOURCE) as file:
            code = "".join(line for line in file if line.strip() and not line.startswith("#"))
        # An editable wheel takes nothing from build_lib, only what is installed into it.
        install = self.get_finalized_command("install")
        folder = install.install_lib if self.editable_mode else self.build_lib
        self.mkpath(folder)
        with open(os.path.join(folder, "ofengine.pth"), "w") as file:
            # Python runs those lines of a .pth file that begin with `import`.
            file.write(f"import sys; exec({code!r}, {{'__name__': 'ofengine.pth'}})\n")

    def get_source_files(self) -> List[str]:
        return [SOURCE]

    def get_outputs(self) -> List[str]:
        return [] if self.editable_mode else [os.path.join(self.build_lib, "ofengine.pth")]

    def get_output_mapping(self) -> Dict[str, str]:
        return {}


build.sub_commands = [*build.sub_commands, ("build_pth", None)]
setup(cmdclass={"build_pth": build_pth})
