"""The packages, and what an installed copy needs beside them: assets/ and configs/ go inside stablerep/."""

from setuptools import find_packages, setup

DATA = {"stablerep.assets": "assets", "stablerep.configs": "configs"}

setup(
    packages=[*find_packages(include=["launch*", "generation*", "stablerep*"]), *DATA],
    package_dir=DATA,
    package_data={name: ["**/*"] for name in DATA},
)
