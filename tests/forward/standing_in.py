"""bench/gpu.py with stand-in parts, for tests of how rows are kept: a script, whose parts are named by the first word
and whose other words are gpu.py's. Demands nothing but Python."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
from _running import Part  # noqa: E402

# a row printed or told, then its number into the file that says it was: what has a number must be a row. The long rows
# do not fit into one page.
COUNTING = """
import os, sys, time
sys.path.insert(0, {bench!r})
import _rows
seen = os.open({seen!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for n in range({rows}):
    line = _rows.line_of({{"bench": {name!r}, "partial": n, "n": n, "long": "x" * (n % 7 * 3000)}})
    print(_rows.told(line) if {told} else line, flush=True)
    os.write(seen, f"{name} {{n}}\\n".encode())
    time.sleep(0.005)
"""


def counting(name: str, seen: str, rows: int, told: bool) -> Part:
    code = COUNTING.format(bench=str(BENCH), seen=seen, rows=rows, name=name, told=told)
    return Part(name, [sys.executable, "-c", code], 60, least_s=0.1)


def main() -> None:
    kind, seen = sys.argv.pop(1).split(":", 1)
    if kind == "counting":
        made = [counting(name, seen, 60, name == "b") for name in "abc"]
    else:  # a child in a session of its own, which would outlive its part and hold the pipe
        code = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'],\
 start_new_session=True); open({seen!r}, 'w').write(str(p.pid)); print('started', flush=True); time.sleep(300)"
        made = [
            Part("starter", [sys.executable, "-c", code], 60, least_s=0.1),
            counting("after", seen + "2", 3, True),
        ]
    gpu.parts = lambda mode, python=sys.executable: made
    gpu.main()


if __name__ == "__main__":
    main()
