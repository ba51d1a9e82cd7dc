"""From an instruction of a compiled kernel to the line it came from, through the library's line table."""

from bisect import bisect_right
from functools import cache
from pathlib import Path

from elftools.elf.elffile import ELFFile


@cache
def _table(library: Path) -> list[tuple[int, str, int]]:
    """(address, file, line) in ascending order; an empty file name ends a run of instructions."""
    rows = []
    with library.open("rb") as stream:
        dwarf = ELFFile(stream).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            files = program.header["file_entry"]
            first = 0 if program.header["version"] >= 5 else 1
            for entry in program.get_entries():
                state = entry.state
                if state is None:
                    continue
                name = "" if state.end_sequence else Path(files[state.file - first].name.decode()).name
                rows.append((state.address, name, state.line))
    return sorted(rows, key=lambda row: row[0])


def place(library: Path, address: int) -> str:
    """ "name.metal:12", or "?" for an instruction of no known line."""
    rows = _table(library)
    i = bisect_right(rows, address, key=lambda row: row[0]) - 1
    if i < 0 or not rows[i][1] or not rows[i][2]:
        return "?"
    return f"{rows[i][1]}:{rows[i][2]}"
