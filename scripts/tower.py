#!/usr/bin/env python3
"""Prints the modules of `src` in order of dependency, as their `use crate::` lines have it: a row uses the rows above it.
Fails where imports form a circle, lead upward in the tower of docs/design.md, or go through the root of the crate.
Tests inside the files do not count."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"


def imports(file: Path) -> set[str]:
    """The modules that a file names, without its tests and comments; `self` marks the root of the crate."""
    code = file.read_text().split("#[cfg(test)]\nmod tests")[0]
    code = "\n".join(line.split("//")[0] for line in code.splitlines())
    root = set(re.findall(r"\bcrate::([A-Z{*]\w*)", code))
    return set(re.findall(r"\bcrate::([a-z]\w*)", code)) | ({"self"} if root else set())


def described() -> dict[str, int]:
    """The row of each module in the tower of docs/design.md: the left column, where a comma at the end goes on."""
    text = (ROOT / "docs" / "design.md").read_text().split("\n## Modules\n")[1]
    rows, row = {}, 0
    for line in text.split("```text\n")[1].split("```")[0].splitlines():
        modules = re.split(r" {2,}", line)[0]
        rows |= {name.strip().rstrip("/"): row for name in modules.split(",") if name.strip()}
        row += not modules.endswith(",")
    return rows


def main() -> int:
    uses: dict[str, set[str]] = {}
    through_root = []
    for file in sorted(SOURCE.rglob("*.rs")):
        module = file.relative_to(SOURCE).parts[0].removesuffix(".rs")
        if module == "lib":
            continue
        found = imports(file)
        if "self" in found:
            through_root.append(str(file.relative_to(SOURCE)))
        uses.setdefault(module, set()).update(found - {"self", module})
    rows: list[list[str]] = []
    left = dict(uses)
    while left:
        row = sorted(module for module, used in left.items() if not used & left.keys())
        if not row:
            break
        rows.append(row)
        left = {module: used for module, used in left.items() if module not in row}
    for row in rows:
        print(", ".join(row))
    # What only lies above a circle is not in it.
    while top := [module for module in left if not any(module in used for used in left.values())]:
        left = {module: used for module, used in left.items() if module not in top}
    for module, used in left.items():
        print(f"circle: {module} -> {', '.join(sorted(used & left.keys()))}", file=sys.stderr)
    tower = described()
    wrong = [f"not in one of docs/design.md and src: {module}" for module in sorted(tower.keys() ^ uses.keys())]
    for module, used in uses.items():
        for other in sorted(used & tower.keys()):
            if module in tower and tower[other] >= tower[module]:
                wrong.append(f"upward, by docs/design.md: {module} -> {other}")
    for line in wrong:
        print(line, file=sys.stderr)
    for file in through_root:
        print(f"imports through the root of the crate: {file}", file=sys.stderr)
    return 1 if left or wrong or through_root else 0


if __name__ == "__main__":
    sys.exit(main())
