"""What PyPI's advisories say of the installed packages, asked through pip-audit; run by ``make audit``.

Exit code 1 where a package has a known hole that a newer version closes. Where the advisories cannot be asked (no
network, a mirror without them) that is said, and nothing fails: test_dependency_floors.py holds to the known ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

COMMAND = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json"]
COMMAND += ["--progress-spinner", "off"]
SECONDS = 300


def main(command: Sequence[str] = COMMAND) -> int:
    """Asks, says what came of it, and gives the exit code."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _nothing(str(error))
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = done.stderr.strip().splitlines()
        return _nothing(lines[-1] if lines else f"exit code {done.returncode}")
    return report(packages)


def report(packages: Sequence[dict[str, Any]]) -> int:
    """Says which packages have known holes; 1 where a newer version closes one."""
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return _nothing(packages[0]["skip_reason"] if packages else "no package is installed")
    worst = 0
    for package in asked:
        for hole in package["vulns"]:
            fixed = ", ".join(hole["fix_versions"])
            names = ", ".join([hole["id"], *hole.get("aliases", [])])
            print(f"{package['name']} {package['version']}: {names}; {f'closed in {fixed}' if fixed else 'still open'}")
            worst = max(worst, bool(fixed))
    print(f"audit: {len(asked)} packages asked about, {len(packages) - len(asked)} unknown to PyPI")
    return int(worst)


def _nothing(why: str) -> int:
    print(f"audit: the advisories could not be asked, so nothing was audited ({why})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
