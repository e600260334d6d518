#!/usr/bin/env python3
"""Refuses calls of tch in the sources of the library and of the crates that take a number, such as `f_mul_scalar`: they
panic where libtorch fails, and `src/arithmetic.rs` says why and what to call instead. The list of them is read from the
sources of tch. Tests inside the files do not count."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "src", *sorted(ROOT.glob("crates/*/src"))]


def sources_of_tch() -> list[Path]:
    """The files of tch in the registry that have methods of tensors."""
    metadata = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--locked"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    packages = json.loads(metadata.stdout)["packages"]
    manifest = next(Path(package["manifest_path"]) for package in packages if package["name"] == "tch")
    return sorted((manifest.parent / "src").rglob("*.rs"))


def takers_of_numbers(files: list[Path]) -> set[str]:
    """The fallible functions with a `Scalar` among their arguments."""
    header = re.compile(r"\bfn (f_\w+)\s*(<[^({]*>)?\s*\(([^{;]*)", re.S)
    found = (match for file in files for match in header.finditer(file.read_text()))
    return {match[1] for match in found if "Scalar" in f"{match[2]}{match[3]}"}


def main() -> int:
    names = takers_of_numbers(sources_of_tch())
    if not {"f_mul_scalar", "f_full", "f_where_scalarother", "f_lerp_"} <= names:
        print("the sources of tch are not understood: a call known to take a number is not found", file=sys.stderr)
        return 1
    refused = 0
    for file in (file for source in SOURCES for file in sorted(source.rglob("*.rs"))):
        code = file.read_text().split("#[cfg(test)]\nmod tests")[0]
        for number, line in enumerate(code.splitlines(), 1):
            code_alone = line.split("//")[0]
            if ".copy()" in code_alone:
                print(f"{file.relative_to(ROOT)}:{number}: copy panics, f_detach_copy does not", file=sys.stderr)
                refused += 1
            for name in re.findall(r"\bf_\w+", code_alone):
                if name in names:
                    print(f"{file.relative_to(ROOT)}:{number}: {name} takes a number", file=sys.stderr)
                    refused += 1
    print(f"{len(names)} calls of tch take a number; {refused} are in the sources")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
