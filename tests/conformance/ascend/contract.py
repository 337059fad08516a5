"""L4: the vendor's schemas, read from a wheel, against those that the adapter is written for."""

from __future__ import annotations

import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

from transom.backends.ascend._schemas import SCHEMAS, VERSION

from .environment import Environment, Unavailable, reason_of

LIBRARY = "torch_npu/lib/libtorch_npu.so"
SCHEMA = re.compile(rb"(_?npu_[a-z0-9_]+(?:\.\w+)?)(\([^\x00-\x1f]*\) -> [^\x00-\x1f]+)\x00")


def changed(environment: Environment, version: str = VERSION) -> list[str]:
    """What differs in the wheel of this version from what the adapter calls, a sentence each; the
    wheel (44 MB) is fetched with pip. Unavailable says why it can't be."""
    with tempfile.TemporaryDirectory() as folder:
        command = [environment.python, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", folder, f"torch-npu=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            why = reason_of(done.stderr)
            raise Unavailable(f"pip cannot fetch torch-npu=={version}: {why}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return differences(wheel.read(LIBRARY), version)


def differences(library: bytes, version: str) -> list[str]:
    """The same of the library's bytes."""
    found = {name.decode(): text.decode() for name, text in SCHEMA.findall(library)}
    out = []
    for name, schema in SCHEMAS.items():
        if name not in found:
            out.append(f"{name}: torch_npu {version} has no such operator")
        elif found[name] != schema:
            out.append(f"{name}: torch_npu {version} says {found[name]}; adapter expects {schema}")
    return out
