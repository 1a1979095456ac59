"""
The locked judge: is kernel.c right, and how fast? `python3 judge.py [--held-out]`

It compiles the file, loads it, and only then draws inputs. Every result is compared with numpy in float64,
the timed ones too. The time is the median of many calls. --held-out takes other shapes. Needs cc and numpy.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

TOLERANCE = 2e-6  # of each value, absolute
REPEATS = 101
SHAPES = [(1, 1), (3, 7), (64, 500), (17, 1000), (256, 512)]
TIMED = (2048, 512)
TIMED_HELD_OUT = (1531, 384)


def compiled(folder: str):
    library = os.path.join(folder, "kernel.so")
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, "kernel.c", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"FAIL: kernel.c does not compile: {done.stderr.strip()[:2000]}")
    function = ctypes.CDLL(library).softmax
    floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    function.argtypes, function.restype = [floats, floats, ctypes.c_long, ctypes.c_long], None
    return function


def check(x: np.ndarray, y: np.ndarray):
    """Against float64, row by row."""
    wide = x.astype(np.float64)
    wide = np.exp(wide - wide.max(axis=1, keepdims=True))
    error = np.abs(y - wide / wide.sum(axis=1, keepdims=True)).max()
    if not error <= TOLERANCE:  # NaN is no smaller
        sys.exit(f"FAIL: wrong by {error:.3g} for {x.shape[0]} rows of {x.shape[1]}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        softmax = compiled(folder)
        draw = np.random.default_rng()  # by the system's entropy: nobody knows the inputs before
        shapes, timed = SHAPES, TIMED
        if "--held-out" in sys.argv:
            shapes, timed = [(5, 33), (31, 129), (100, 2000)], TIMED_HELD_OUT
        for rows, columns in shapes:
            for size in (1, 10, 80):
                x = draw.uniform(-size, size, (rows, columns)).astype(np.float32)
                y = np.full_like(x, np.nan)
                softmax(x, y, rows, columns)
                check(x, y)
        inputs = [draw.normal(0, 3, timed).astype(np.float32) for _ in range(3)]
        outputs = [np.full_like(x, np.nan) for x in inputs]
        seconds = []
        for repeat in range(REPEATS):
            i = repeat % len(inputs)
            inputs[i][repeat] = draw.normal(0, 3, timed[1])  # no call repeats another
            began = time.perf_counter()
            softmax(inputs[i], outputs[i], *timed)
            seconds.append(time.perf_counter() - began)
        for x, y in zip(inputs, outputs):
            softmax(x, y, *timed)
            check(x, y)
    print(f"METRIC ns_per_row={1e9 * sorted(seconds)[len(seconds) // 2] / timed[0]:.1f}")
    print(f"METRIC gb_per_second={8 * timed[0] * timed[1] / min(seconds) / 1e9:.2f}")


if __name__ == "__main__":
    main()
