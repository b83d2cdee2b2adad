"""The configuration file of an application: TOML, a key for each command-line option, of the same name.

    interfaces = ["eth0", "eth1"]
    cores = "2,3"
    only = ["198.51.100.0/24"]

What the command line says has the last word.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from libfp.errors import BadInput, Error

WITHOUT_KEY = ("config", "sealed")
_WHERE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def read(path: str, command: click.Command, context: click.Context) -> dict[str, Any]:
    """Parameter names of `command` to what the file at `path` says of them.

    Raises BadInput that names the file and the line.
    """
    text, table = parse(path)
    return _File(path, text, command, context).values(table)


def parse(path: str) -> tuple[str, dict[str, Any]]:
    """The text of the TOML file at `path`, and what it says. Raises BadInput that names the file and the line."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "name a configuration file") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no text", "name a configuration file: TOML, in UTF-8") from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _WHERE.search(str(error))
        line = found[1] if found is not None and found[1] else text.count("\n") + (not text.endswith("\n"))
        what = f"{path}, line {line}: {_WHERE.sub('', str(error))}"
        raise BadInput(what, "it is TOML: name = value, one a line") from None


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """What a file may say: the options' long names without their dashes."""
    found = {}
    for parameter in command.params:
        longest = max(parameter.opts, key=len).removeprefix("--")
        if parameter.name not in WITHOUT_KEY and longest != "help":
            found[longest] = parameter
    return found


class _File:
    def __init__(self, path: str, text: str, command: click.Command, context: click.Context) -> None:
        self.path, self.context, self.name = path, context, command.name
        self.keys = keys(command)
        self.others = getattr(command, "tables", ())  # for the application itself to read
        self._lines = text.splitlines()

    def values(self, table: Mapping[str, Any]) -> dict[str, Any]:
        made = {}
        for key, value in table.items():
            if key in self.others:
                continue
            parameter = self.keys.get(key)
            if parameter is None:
                shown = repr(key) if re.fullmatch(r"[\w -]{1,24}", key) else "such key"  # a key without its name
                self.wrong(key, f"there is no {shown}", f"there are {', '.join(sorted({*self.keys, *self.others}))}")
            assert parameter.name is not None
            made[parameter.name] = self._value(key, value, parameter)
        return made

    def wrong(self, key: str, what: str, remedy: str) -> NoReturn:
        raise BadInput(f"{self.path}, line {self._line(key)}: {what}", remedy)

    def _line(self, key: str) -> int:
        """Where the key is: tomllib does not say."""
        name = re.escape(key)
        pattern = re.compile(rf"""\s*(\[+\s*)?["']?{name}["']?\s*[=.\]]""")
        return next((number for number, line in enumerate(self._lines, 1) if pattern.match(line)), 1)

    def _value(self, key: str, value: Any, parameter: click.Parameter) -> Any:
        many = parameter.multiple if isinstance(parameter, click.Option) else parameter.nargs == -1
        if many:
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                self.wrong(key, f"{key} is not a list of words", f'write {key} = ["...", "..."]')
            return tuple(self._converted(key, one, parameter) for one in value)
        if isinstance(parameter, click.Option) and parameter.is_flag:
            if not isinstance(value, bool):
                self.wrong(key, f"{key} is {value!r}", "write true or false")
            return value
        if isinstance(parameter.type, click.types.IntParamType | click.IntRange):
            if type(value) is not int:
                self.wrong(key, f"{key} is {value!r}", "write a number")
        elif key == "cores" and (type(value) is int or _are_numbers(value)):
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        elif not isinstance(value, str):
            self.wrong(key, f"{key} is {value!r}", f'write {key} = "..."')
        return self._converted(key, value, parameter)

    def _converted(self, key: str, value: Any, parameter: click.Parameter) -> Any:
        try:
            value = parameter.type.convert(value, parameter, self.context)
            if parameter.callback is not None and not getattr(parameter, "multiple", False):
                value = parameter.callback(self.context, parameter, value)
        except click.BadParameter as error:
            self.wrong(key, f"{key}: {error.message.rstrip('.')}", f"fp {self.name} --help says what there is")
        except Error as error:
            self.wrong(key, error.what, error.remedy)
        return value


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
