"""Debian packages and wheels as sources of data: downloaded and unpacked below a folder, nothing is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path


def unpack_debian(packages: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Downloads Debian packages into ``folder`` and unpacks each into ``folder/root``.

    Packages that an earlier call has downloaded are not downloaded again.

    Returns:
        The version of each package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in packages:
        if not list(folder.glob(f"{package}_*.deb")):
            # As root, apt hands downloads to a user of its own, who may be unable to write into the folder.
            command = ["apt-get", "-o", "APT::Sandbox::User=root", "-q", "download", package]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = max(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, folder / "root"], check=True)
        command = ["dpkg-deb", "-f", archive, "Version"]
        versions[package] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return versions


def open_wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """Opens a wheel of the package index, downloaded once into ``folder``.

    Args:
        requirement: Package and version, ``name==version``.
        folder: Where wheels are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
    return zipfile.ZipFile(next(folder.glob(pattern)))
