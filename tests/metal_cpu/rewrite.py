"""The three things of Metal that C++ for OpenCL has no syntax for, replaced line by line.

    threadgroup float a[32], b;        a reference to memory that the runtime gives the threadgroup
    static_cast<float4>(x)             metal::detail::cast<float4>(x)
    vec<T, 4>(a, b, c, d)              metal::detail::make<vec<T, 4>>(a, b, c, d)

float4(a, b, c, d) and its like are macros in the headers. Everything else reaches the compiler as it stands.
"""

import re

# threadgroup, a type, and declarators without pointers or initialisers.
_THREADGROUP = re.compile(
    r"""(?<![\w(,<])threadgroup\s+
        (?P<type>(?:const\s+|volatile\s+)*(?:typename\s+)?[A-Za-z_][\w:]*(?:\s*<[^;{}()=]*?>)?(?:::\w+)*)\s+
        (?P<names>[A-Za-z_]\w*\s*(?:\[[^;{}]*\])?(?:\s*,\s*[A-Za-z_]\w*\s*(?:\[[^;{}]*?\])*)*)\s*;""",
    re.VERBOSE,
)
_VECTOR = r"(?:metal::)?(?:(?:float|half|bfloat|u?int|u?short|u?char|u?long)[234]|vec\s*<[^<>]*>)"
_CAST = re.compile(rf"\bstatic_cast\s*<\s*({_VECTOR})\s*>")
_MAKE = re.compile(r"\b(?:metal::)?vec\s*<([^<>]*(?:<[^<>]*>)?[^<>]*)>\s*\(")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def without_comments(source: str) -> str:
    """`source` with comments blanked; every character that stays keeps its line and column."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), source)


def rewrite(source: str) -> str:
    """Metal source as C++ for OpenCL, with the same number of lines."""
    source = _THREADGROUP.sub(_threadgroup_variables, without_comments(source))
    source = _CAST.sub(r"metal::detail::cast<\1>", source)
    return _MAKE.sub(r"metal::detail::make<metal::vec<\1>>(", source)


def _threadgroup_variables(match: re.Match[str]) -> str:
    statements = []
    for declarator in _split(match["names"]):
        name = re.split(r"\W", declarator, maxsplit=1)[0]
        kind = f"threadgroup_{name}_t"
        statements.append(
            f"typedef {match['type']} {kind}{declarator.removeprefix(name)}; "
            f"threadgroup {kind}& {name} = *(threadgroup {kind}*)(ulong)metal_cpu_threadgroup_variable("
            f'"{name}", sizeof({kind}), alignof({kind}), METAL_CPU_HERE);'
        )
    # On the line of the declaration's first word, then as many line ends as the declaration had.
    return re.sub(r"\s*\n\s*", " ", " ".join(statements)) + "\n" * match.group().count("\n")


def _split(declarators: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for character in declarators:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
