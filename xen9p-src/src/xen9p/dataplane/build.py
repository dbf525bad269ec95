"""Builds ``xen9p._dataplane``, the C data plane, with cffi in API mode."""

import os
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
UNITS = sorted(path.name for path in HERE.glob("*.c"))

# The fields of C's structures that Python reads; the rest is C's own.
VISIBLE = """
struct x9_req {
    uint16_t tag;
    uint8_t type;
    uint32_t size; /* bytes in msg, header included */
    uint8_t *msg;  /* private copy of the whole message */
    ...;
};
struct x9_fid {
    uint32_t num;
    int path_fd;     /* O_PATH, or the open descriptor */
    int io_fd;       /* -1 until Tlopen or Tlcreate */
    uint32_t uid;    /* the caller's uid on the guest, from Tattach */
    uint32_t format; /* S_IFMT bits */
    ...;
};
"""

ffibuilder = cffi.FFI()
ffibuilder.cdef((HERE / "api.h").read_text() + VISIBLE)
ffibuilder.set_source(
    "xen9p._dataplane",
    '#include "x9.h"',
    sources=[os.path.relpath(HERE / name) for name in UNITS],
    include_dirs=[str(HERE)],
    depends=[str(path) for path in sorted(HERE.glob("*.h"))],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread"],
    extra_link_args=["-pthread"],
    define_macros=[("_GNU_SOURCE", "1")],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
