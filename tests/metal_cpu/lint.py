"""Rules of Metal's compiler that clang does not have for C++ for OpenCL.

    pointers and references name their address space      clang lets them be generic; its syntax tree says where
    nothing becomes a bfloat without a cast               clang converts, but warns
    private arrays stay small                             a GPU spills them to memory; clang knows the frame's size

Owns reading the compiler's answers. Leaves running it to `compile.py`.
"""

import re
from pathlib import Path

PRIVATE_LIMIT = 32768  # bytes of a thread's frame; instrumented code needs a little more than the arrays
FLAGS = ("-fsyntax-only", "-w", "-Xclang", "-ast-dump", "-fno-color-diagnostics")

# "| |-VarDecl 0x55 <header:3:5, col:12> col:12 used p 'const __generic float *'"
_NODE = re.compile(
    r"[ |`-]*(?P<kind>\w+) 0x[0-9a-f]+ (?:prev 0x[0-9a-f]+ )?<(?P<range>[^<>]*(?:<[^<>]*>[^<>]*)*)> (?P<at>\S+)?"
)
_USER = re.compile(r"^.*<(?:header|[\w.-]+\.metal):", re.MULTILINE)
_PLACE = re.compile(r"([^\s,<>]+):(\d+):\d+")
_DECLARED = re.compile(r"(?<=\s)([A-Za-z_]\w*) '([^']*[*&][^']*)'")
_DECLARATIONS = ("VarDecl", "ParmVarDecl", "FieldDecl")
_FLAGS_OF_NODES = ("used", "referenced", "implicit", "invalid")
_SPACE = re.compile(r"__(global|local|constant|private)\b|\bauto\b")


def unqualified(tree: str) -> list[str]:
    """Declarations in the kernel or its header of a pointer or reference without an address space."""
    found = []
    file, line = "", "0"
    # The kernel comes last; of the headers before it nothing is looked at.
    start = _USER.search(tree)
    for text in tree[start.start() :].splitlines() if start else ():
        node = _NODE.match(text)
        if not node:
            continue
        for where in (node["range"], node["at"] or ""):
            for name, number in _PLACE.findall(where):
                # clang prints a place in full only where it differs from the last one it printed.
                if name != "col":
                    line = number
                    file = file if name == "line" else name
        if node["kind"] not in _DECLARATIONS or not (file == "header" or file.endswith(".metal")):
            continue
        declared = _DECLARED.search(re.sub(r"\[[^\]]*\]", "[]", text))
        if not declared or declared[1] in _FLAGS_OF_NODES:
            continue
        pointee = declared[2][: max(declared[2].rfind("*"), declared[2].rfind("&"))]
        if "__generic" in pointee or not _SPACE.search(pointee):
            kind = declared[2].replace("__generic ", "").replace("__private", "").strip()
            found.append(f"{Path(file).name}:{line}: '{declared[1]}' of type '{kind}' names no address space")
    return sorted(set(found))


def warned(warnings: str) -> list[str]:
    """The compiler's warnings that are errors here: a float that silently becomes a bfloat, too much private memory."""
    lossy = [line for line in warnings.splitlines() if "loses floating-point precision" in line]
    large = [line for line in warnings.splitlines() if "stack frame size" in line]
    return [f"{line}: Metal wants a cast" for line in lossy if re.search(r"to '[^']*(bfloat|__bf16)", line)] + large
