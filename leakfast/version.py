"""The version of this package; pyproject.toml and the files that a run leaves take it from here."""

__version__ = "0.1.0"
