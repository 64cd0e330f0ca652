"""Looks for known vulnerabilities of the versions in constraints.txt, with pip-audit.

    python .ci/audit.py [--allow-unanswered] [ignored vulnerability ...]

Exit status 0: none is known, 1: some are, 2: not all could be looked up (0 with --allow-unanswered).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
VULNERABLE = "jinja2==2.10"  # since 2019. pip-audit takes a service that knows no package for one that found nothing


def look_up(requirements: Path, ignored: list[str]) -> list[dict]:
    """What pip-audit says of each of these versions; nothing where it fails."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off"]
    command += [part for name in ignored for part in ("--ignore-vuln", name)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(done.stderr[-1000:], file=sys.stderr)
        return []


def answers() -> bool:
    """Whether the service finds what has been known for years."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(VULNERABLE, "utf-8")
        return any(package.get("vulns") for package in look_up(requirements, []))


def main(arguments: list[str]) -> int:
    """Prints what is vulnerable and what could not be looked up."""
    unanswered = 0 if "--allow-unanswered" in arguments else 2
    ignored = [name for name in arguments if not name.startswith("--")]
    packages = look_up(CONSTRAINTS, ignored) if answers() else []
    if not packages:
        print("NOT AUDITED: the service of known vulnerabilities does not answer.")
        return unanswered
    found = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", [])]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    if skipped:
        print(f"NOT AUDITED: {', '.join(skipped)}")
    print(f"{len(packages) - len(skipped)} packages looked up, {len(found)} known vulnerabilities.")
    return 1 if found else unanswered if skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
