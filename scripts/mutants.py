"""Mutation testing of src with all mutants in one binary.

    ./with-libtorch python3 scripts/mutants.py src/probe.rs src/regularizer/*.rs

cargo-mutants (`cargo install cargo-mutants --locked`) lists the mutants; where it would build and
link against libtorch once for each of them, this puts every mutated body beside the original one,
in a copy of the crate under target/mutants, and chooses by an environment variable which one runs.
Mutants that do not compile are dropped. Outcomes are kept in target/mutants/outcomes.json and not
computed again: after new tests, `--survivors` tries again what had survived.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benches/pytorch"))
from compare import settings  # noqa: E402, what it imports comes with Python

COPY = ROOT / "target" / "mutants"
OUTCOMES = COPY / "outcomes.json"
SECONDS = 120
# Tried last, after what fails in a second.
SLOW = (
    "memory::the_discrepancy",
    "maximum_mean_discrepancy::blocks_of_rows",
    "shapes_and_types::terms_take",
)
SWITCH = """
#[allow(missing_docs)]
mod mutant {
    pub(crate) fn active() -> usize {
        static ACTIVE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
        *ACTIVE.get_or_init(|| std::env::var("MUTANT").map_or(0, |id| id.parse().unwrap_or(0)))
    }
}
"""
# The trainings and the tests of the examples are left out, as for the coverage.
OTHER = re.compile("ablation|zimage_.*")
PROGRAMS = [(path.stem, path.name) for path in (ROOT / "tests").glob("*.rs")]
PROGRAMS += [(path.parent.name, f"{path.parent.name}/main.rs") for path in (ROOT / "tests").glob("*/main.rs")]
TESTS = sorted(program for program in PROGRAMS if not OTHER.fullmatch(program[0]))


def listed(files):
    command = ["cargo", "mutants", "--list", "--json", "--no-config"]
    for file in files:
        command += ["--file", file]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def offset(text, position):
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[: position["line"] - 1])) + position["column"] - 1


def body(text, function):
    """From behind the opening brace of a function to before its closing one."""
    end = offset(text, function["span"]["end"]) - 1
    depth, start = 0, end
    while start == end or depth > 0:
        depth += {"}": 1, "{": -1}.get(text[start], 0)
        start -= 1
    return start + 2, end


def copy_crate():
    for folder in ("src", "tests"):
        shutil.rmtree(COPY / folder, ignore_errors=True)
        shutil.copytree(ROOT / folder, COPY / folder)
    for file in ("Cargo.lock", "build.rs", "README.md"):
        shutil.copy(ROOT / file, COPY / file)
    manifest = (ROOT / "Cargo.toml").read_text()
    # A workspace of its own, without members.
    manifest = re.sub(r"\[workspace\]\n(?:[^\n]+\n)+", "[workspace]\n", manifest)
    manifest = re.sub(r"(?:zimage|tch-training) = .*\n", "", manifest)
    manifest = re.sub(r"\[\[bench\]\]\n(?:[^\n]+\n)+", "", manifest) + '\n[[test]]\nname = "every"\n'
    automatic = "".join(f"auto{kind} = false\n" for kind in ("tests", "benches", "examples"))
    manifest = manifest.replace('build = "build.rs"\n', 'build = "build.rs"\n' + automatic)
    (COPY / "Cargo.toml").write_text(manifest)
    every = "".join(f'#[path = "{path}"]\nmod {name};\n' for name, path in TESTS)
    (COPY / "tests" / "every.rs").write_text(every)


def write_mutants(mutants):
    """Puts them into the copy; returns for each file which lines belong to which mutant."""
    lines = {}
    with (COPY / "src" / "lib.rs").open("a") as library:
        library.write(SWITCH)
    for file in {mutant["file"] for mutant in mutants.values()}:
        text = (ROOT / file).read_text()
        functions = {}
        for id, mutant in mutants.items():
            if mutant["file"] == file:
                functions.setdefault(body(text, mutant["function"]), []).append(id)
        result, copied = "", 0
        for (start, end), ids in sorted(functions.items()):
            result += text[copied:start] + "\nmatch crate::mutant::active() {\n"
            for id in ids:
                span, replacement = mutants[id]["span"], mutants[id]["replacement"]
                low, high = offset(text, span["start"]), offset(text, span["end"])
                first = result.count("\n") + 1
                # A space takes the place of a deleted operator.
                result += f"{id} => {{{text[start:low]} {replacement} {text[high:end]}}}\n"
                lines.setdefault(file, []).append((first, result.count("\n"), id))
            result += "_ => {" + text[start:end] + "}\n}\n"
            copied = end
        (COPY / file).write_text(result + text[copied:])
    return lines


def build(mutants):
    """Drops what does not compile, until the rest does; returns the test binaries."""
    while True:
        copy_crate()
        lines = write_mutants(mutants)
        command = ["cargo", "test", "--lib", "--test", "every", "--no-run", "--message-format=json"]
        command += ["--config", "profile.dev.package.decoupled-dmd.debug=0"]
        environment = os.environ | {"CARGO_TARGET_DIR": str(ROOT / "target")}
        run = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)
        messages = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if run.returncode == 0:
            binaries = [m["executable"] for m in messages if m.get("executable")]
            # The one that catches most comes first.
            return sorted(binaries, key=lambda path: "every" not in path)
        bad, other = set(), []
        for message in (m["message"] for m in messages if m["reason"] == "compiler-message"):
            if message["level"] != "error":
                continue
            places = [span for span in message["spans"] if span["is_primary"]]
            found = {
                id
                for place in places
                for first, last, id in lines.get(place["file_name"], [])
                if first <= place["line_start"] <= last
            }
            bad |= found
            if places and not found:
                other.append(message["rendered"])
        if not bad:
            sys.exit("\n".join(other) or run.stderr)
        for id in bad:
            del mutants[id]
        print(f"{len(bad)} do not compile", flush=True)


def outcome(binaries, id):
    # `--fail-fast` is not stable yet. The tests of one process share a random generator, and their
    # locks are one for each program here: one thread.
    # Without cargo's settings some tests take thirty times as long.
    environment = os.environ | settings()
    environment |= {"MUTANT": str(id), "RUSTC_BOOTSTRAP": "1", "RUST_BACKTRACE": "0"}
    environment["PROPTEST_DISABLE_FAILURE_PERSISTENCE"] = "1"
    arguments = ["-Zunstable-options", "--fail-fast", "--test-threads=1"]
    skipped = [part for name in ("training", *SLOW) for part in ("--skip", name)]
    runs = [[binary, *skipped] for binary in binaries] + [[binaries[0], *SLOW]]
    for run in runs:
        try:
            command = [*run, *arguments]
            done = subprocess.run(
                command, cwd=COPY, env=environment, capture_output=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        if done.returncode != 0:
            return "caught"
    return "survived"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="source files, relative to the root of the crate")
    parser.add_argument("--survivors", action="store_true", help="again what survived or timed out")
    options = parser.parse_args()
    COPY.mkdir(parents=True, exist_ok=True)
    known = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    if options.survivors:
        done = ("caught", "does not compile")
        known = {name: found for name, found in known.items() if found in done}
    names = listed(options.files)
    for mutant in names:
        if not mutant["function"]:
            print(f"not in a function, try it by hand: {mutant['name']}")
    wanted = [m for m in names if m["function"] and m["name"] not in known]
    mutants = dict(enumerate(wanted, start=1))
    binaries = build(mutants)
    if outcome(binaries, 0) != "survived":
        sys.exit("the tests fail without a mutant")
    compiled = {mutant["name"] for mutant in mutants.values()}
    known |= {m["name"]: "does not compile" for m in wanted if m["name"] not in compiled}
    for id, mutant in mutants.items():
        known[mutant["name"]] = found = outcome(binaries, id)
        if found != "caught":
            print(f"{found}: {mutant['name']}", flush=True)
        OUTCOMES.write_text(json.dumps(known, indent=1))
    outcomes = [known[mutant["name"]] for mutant in names if mutant["function"]]
    counts = {found: outcomes.count(found) for found in set(outcomes)}
    print(", ".join(f"{count} {found}" for found, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
