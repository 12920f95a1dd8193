"""Names whose modules are imported when they are first used: torch alone takes a second to import.

`ringcompile --help` and shell completion read what options there are and need nothing else. So
modules that declare commands import only light modules at once, and those that compute through
`Later`; the package's own names are `Public`. Python 3.15 has `lazy import` for this.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class Later(ModuleType):
    """Stands for a module, which is imported when one of its attributes is first read.

    if TYPE_CHECKING:
        from ringcompile import compiler
    else:
        compiler = Later("ringcompile.compiler")
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self.__name__), name)
        setattr(self, name, value)
        return value


class Public:
    """A name of a package that comes from a module below it, imported when it is first read.

    It is an attribute of the package's class, which goes before the package's own: importing a
    submodule of the same name (`ringcompile.capture` is a folder and a function) sets the latter.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name
        self._value: Any = None

    def __get__(self, package: ModuleType | None, owner: type[ModuleType]) -> Any:
        if self._value is None:
            self._value = getattr(import_module(self._module), self._name)
        return self._value

    def __set__(self, package: ModuleType, value: object) -> None:
        submodule = f"{package.__name__}.{self._name}"
        if not (isinstance(value, ModuleType) and value.__name__ == submodule):
            self._value = value


def package_with(names: dict[str, str]) -> type[ModuleType]:
    """The class of a package that has these names.

    Args:
        names: each name and the module that it is imported from.
    """

    def listed(package: ModuleType) -> list[str]:
        return sorted({*vars(package), *names})

    public = {name: Public(module, name) for name, module in names.items()}
    return type("Package", (ModuleType,), {"__dir__": listed, **public})
