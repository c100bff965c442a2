"""Everything about the package is written once, in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="MIT",
    keywords=cfg["keywords"],
    packages=find_packages(include=[f"{cfg['lib_name']}*"]),
    package_data={cfg["lib_name"]: ["models/shipped/*", "data/*.zip", "runs/*.csv"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("text", "ray", "real", "peft", "lightning", "dev")},
    entry_points={"console_scripts": [f"{cfg['lib_name']} = {cfg['lib_name']}.cli:app"]},
)
