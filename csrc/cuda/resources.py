"""What each CUDA kernel takes of a multiprocessor, as the assembler reports it.

    resources.py compile OBJECT COMMAND...   runs COMMAND; keeps the assembler's report in OBJECT.resources
    resources.py report BUILD_DIR            prints the table; fails where a kernel spills that may not

A spill is a register kept in memory: in a kernel that was written to live in registers, it is a mistake.
"""

import re
import subprocess
import sys
from pathlib import Path

# Kernels that may spill: a part of the demangled name -> why.
ALLOWED_SPILLS: dict[str, str] = {}

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
OF_ASSEMBLER = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


def compile_object(target: str, command: list[str]) -> int:
    """Runs the compiler; what the assembler says goes to a file, everything else to the user."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines()
    Path(f"{target}.resources").write_text("\n".join(line for line in lines if OF_ASSEMBLER.match(line)))
    rest = [line for line in lines if line.strip() and not OF_ASSEMBLER.match(line)]
    if rest:
        print("\n".join(rest), file=sys.stderr)
    return done.returncode


def demangled(names: list[str]) -> list[str]:
    """Readable names without their parameters, where c++filt is at hand."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    short = []
    for name in done.stdout.splitlines():
        name = name.replace("(anonymous namespace)::", "").replace("alula::", "").removeprefix("void ")
        short.append(re.sub(r"\(int\)|\(bool\)", "", name[: name.rfind("(")] if name.endswith(")") else name))
    return short


def report(build: Path) -> int:
    """Prints kernel, architecture, registers a thread, static shared memory, stack and spills."""
    files = [file for file in sorted(build.glob("cuda/*.resources")) if file.with_suffix("").exists()]
    if not files:
        print("no CUDA kernels in this build: nothing to report")
        return 0
    rows = []
    for file in files:
        entry, stack = None, (0, 0, 0)
        for line in file.read_text().splitlines():
            if found := ENTRY.search(line):
                entry = found.groups()
            elif found := STACK.search(line):
                stack = tuple(map(int, found.groups()))
            elif entry and (found := USED.search(line)):
                shared = SHARED.search(line)
                rows.append((*entry, int(found[1]), int(shared[1]) if shared else 0, stack[0], stack[1] + stack[2]))
                entry = None
    names = demangled([row[0] for row in rows])
    print(f"{'kernel':<72} {'arch':>7} {'regs':>5} {'smem':>6} {'stack':>6} {'spills':>6}")
    failed = []
    for name, (_, arch, registers, shared, frame, spills) in sorted(zip(names, rows, strict=True)):
        reason = next((why for part, why in ALLOWED_SPILLS.items() if part in name), "")
        print(f"{name:<72} {arch:>7} {registers:>5} {shared:>6} {frame:>6} {spills:>6}  {reason if spills else ''}")
        if spills and not reason:
            failed.append(f"{name} ({arch})")
    print(f"{len(rows)} kernels; dynamic shared memory, which they all use, is chosen at launch")
    for name in failed:
        print(f"SPILL: {name} keeps registers in memory; mend it or allow it with a reason", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        sys.exit(compile_object(sys.argv[2], sys.argv[3:]))
    sys.exit(report(Path(sys.argv[2])))
