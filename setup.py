"""The extension is built by CMakeLists.txt; everything else about the package is in pyproject.toml."""

from setuptools import setup

setup(cmake_source_dir=".")
