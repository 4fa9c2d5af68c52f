"""Prints what the extras named on the command line need, a requirement a line: pip then installs it without the
package."""

import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print("\n".join(sorted({requirement for name in sys.argv[1:] for requirement in extras[name]})))
