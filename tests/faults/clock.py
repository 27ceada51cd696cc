"""A clock that somebody sets: a library that is loaded before all others into a process, where it moves the wall clock and
leaves monotonic time alone. Demands Linux and a C compiler; holds no tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# of a process that names a seed (jumping_clock), one look in four finds the clock up to ten years off
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <sys/time.h>
#include <time.h>
static uint64_t state;
static int64_t off;
void jumping_clock(uint64_t seed) { state = seed; }
static int64_t jumped(void) {
  if (!state) return 0;
  state ^= state << 13; state ^= state >> 7; state ^= state << 17;
  if (state % 4 == 0) off = (int64_t)((state >> 8) % 630720000u) - 315360000;
  return off;
}
int clock_gettime(clockid_t id, struct timespec *to) {
  static int (*plain)(clockid_t, struct timespec *);
  if (!plain) plain = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int failed = plain(id, to);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) to->tv_sec += jumped();
  return failed;
}
int gettimeofday(struct timeval *to, void *zone) {
  struct timespec now;
  int failed = clock_gettime(CLOCK_REALTIME, &now);
  to->tv_sec = now.tv_sec;
  to->tv_usec = now.tv_nsec / 1000;
  return failed;
}
time_t time(time_t *to) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (to) *to = now.tv_sec;
  return now.tv_sec;
}
"""


def can_jump() -> bool:
    return sys.platform == "linux" and shutil.which("cc") is not None


def library(folder: Path) -> Path:
    """The library, built in a folder; skips where it cannot be."""
    if not can_jump():
        pytest.skip("a process's clock is made to jump by a compiled library, on Linux (needs cc)")
    made = folder / "clock.so"
    (folder / "clock.c").write_text(SOURCE)
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(folder / "clock.c"), "-ldl"]
    subprocess.run(words, check=True)
    return made
