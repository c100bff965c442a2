"""What the doors of the packages are made of: names that are imported when they are first asked for.

A package's door hands on the names that others may use. Importing it imports nothing else, so that optional libraries stay
optional and the command line answers at once. Some functions bear the name of their module (`theory.bounds`): at the door
that name is the function; the module is `from vitplast.theory.bounds import ...`.
"""
import sys
from importlib import import_module
from types import ModuleType


class Door(ModuleType):
    "A package that imports a name's module when the name is first asked for."

    def __getattr__(self, name):
        if name not in self.__dict__.get("_places", ()):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{self._places[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name, value):
        # Python binds an imported submodule to its package, which would hide the function of that name
        if isinstance(value, ModuleType) and self._places.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *self._places})


def door(package, **names) -> list:
    """Turn a package into a door; returns its `__all__`.

    names: for each module of the package, the names that it hands on, separated by spaces.
    """
    places = {name: module for module, text in names.items() for name in text.split()}
    module = sys.modules[package]
    module.__dict__["_places"] = places
    module.__class__ = Door
    return list(places)
