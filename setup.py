"""Only what pyproject.toml cannot say: the C core is built by build_ext.py through cffi."""

from setuptools import setup

setup(cffi_modules=["build_ext.py:ffibuilder"])
