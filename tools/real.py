"""Get the pictures of the suite `real` that are not Python packages, or say what is missing and how to get it."""
import os
import shutil
import subprocess

from vitplast.data.real import EMOJI, HANDS, REAL, find_real, real_root


def run(*command):
    "Run a command and show it; false where it fails."
    print("$", *command, flush=True)
    return subprocess.run(command).returncode == 0


def missing() -> dict:
    "What each task of the suite lacks."
    found = {}
    for name in REAL:
        try:
            find_real(name)
        except FileNotFoundError as error:
            found[name] = str(error)
    return found


lacks = missing()
if "openclipart" in lacks and shutil.which("apt-get") and os.geteuid() == 0:
    run("apt-get", "install", "-y", "-q", "openclipart-png")
if "emoji" in lacks and shutil.which("npm"):
    run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(real_root()), *(f"emoji-datasource-{hand}@{EMOJI}" for hand in HANDS))
lacks = missing()
print("\n".join(f"missing: {text}" for text in lacks.values()) or "the suite `real` is complete")
if "openclipart" in lacks:
    raise SystemExit("make real needs the pictures of openclipart")
