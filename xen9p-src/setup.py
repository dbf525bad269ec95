"""Adds to pyproject.toml what it cannot say: the C data plane that cffi compiles."""

from setuptools import setup

setup(cffi_modules=["src/xen9p/dataplane/build.py:ffibuilder"])
