#!/usr/bin/env python3
"""Writes cuda_operators.inc: which operators have a CUDA kernel, from torchgen/packaged/ATen/native/native_functions.yaml of
the PyTorch in use.

    python3 shim/cuda_operators.py NATIVE_FUNCTIONS > shim/cuda_operators.inc

One line an operator: its name, 1 if its arguments may be on several devices (`device_check:
NoCheck`), 1 if it has a kernel for dense CUDA tensors.
"""

import re
import sys

entries, entry, in_dispatch = {}, None, False
for line in open(sys.argv[1], encoding="utf-8"):
    line = line.split("#")[0].rstrip()
    if match := re.match(r"- func: ([\w.]+)\(", line):
        entry = entries[match[1]] = {"keys": set(), "nocheck": False, "delegate": None}
        in_dispatch = False
    elif entry is None or not line:
        continue
    elif re.match(r"  \S", line):
        field, _, value = line.strip().partition(":")
        in_dispatch = field == "dispatch"
        if field == "structured_delegate":
            entry["delegate"] = value.strip()
        if field == "device_check":
            entry["nocheck"] = value.strip() == "NoCheck"
        if field == "ufunc_inner_loop":
            entry["keys"] |= {"CPU", "CUDA"}
    elif in_dispatch:
        entry["keys"] |= {key.strip() for key in line.strip().partition(":")[0].split(",")}

for name, entry in sorted(entries.items()):
    source = entries[entry["delegate"]] if entry["delegate"] else entry
    backends = {"CPU", "CUDA"} & (source["keys"] | entry["keys"])
    if backends:
        print(f'{{"{name}", {int(entry["nocheck"])}, {int("CUDA" in backends)}}},')
