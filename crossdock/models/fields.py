"""`Fields`: the fields of a `config.json`, each read with its type and range, so that a wrong one is a named error.

JSON has no types to rely on: a string, a float or a null where a size is meant would otherwise fail far away, in the
middle of a forward, or count for something. A field that is null counts as absent.
"""

import math
from collections.abc import Mapping
from typing import Any

from crossdock.errors import ConfigError


class Fields:
    """A JSON object whose fields are asked for by name; `prefix` is where the object stands in the file.

    Of several names the first that is present is read; `default` is what an absent field means, and without one its
    absence is an error. Every method raises ConfigError naming the field, what was expected and what was found.

    >>> Fields({"vocab_size": "97"}).integer("vocab_size")
    Traceback (most recent call last):
    crossdock.errors.ConfigError: config.json: vocab_size must be an integer of at least 1, found '97'
    """

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self._config, self._prefix = config, prefix

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._config.get(name) is not None

    def integer(self, *names: str, minimum: int = 1, default: int | None = None) -> int:
        name, value = self._find(names, default)
        if type(value) is not int or value < minimum:  # a bool is an int too, and 64.0 is none
            raise self._wrong(name, f"an integer of at least {minimum}", value)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers or a single one; none where the field is absent."""
        value = self._config.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int for item in found):
            raise self._wrong(name, "an integer or a list of integers", value)
        return tuple(found)

    def number(
        self, *names: str, minimum: float = 0.0, above: float | None = None, default: float | None = None
    ) -> float:
        """An integer or a float, finite, at least `minimum` and, where given, more than `above`."""
        name, value = self._find(names, default)
        fits = type(value) in (int, float) and math.isfinite(value) and value >= minimum
        if not fits or (above is not None and value <= above):
            raise self._wrong(
                name, f"a number {f'of at least {minimum:g}' if above is None else f'above {above:g}'}", value
            )
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._find((name,), default)[1]
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def choice(self, *names: str, among: tuple[str, ...], default: str | None = None) -> str:
        name, value = self._find(names, default)
        if not isinstance(value, str) or value not in among:
            raise self._wrong(name, " or ".join(map(repr, among)), value)
        return value

    def section(self, *names: str) -> "Fields":
        """The fields of an object inside this one; of an empty one where it is absent."""
        name = next(filter(self.has, names), names[0])
        value = self._config.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return Fields(value or {}, f"{self._prefix}{name}.")

    def _find(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        name = next(filter(self.has, names), None)
        if name is not None:
            return name, self._config[name]
        if default is None:
            kind = f" of a {self._config['model_type']} model" if "model_type" in self._config else ""
            raise ConfigError(f"config.json{kind} lacks the field '{self._prefix}{names[0]}'")
        return names[0], default

    def _wrong(self, name: str, expected: str, found: object) -> ConfigError:
        return ConfigError(f"config.json: {self._prefix}{name} must be {expected}, found {found!r}")
