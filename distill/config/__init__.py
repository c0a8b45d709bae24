"""The configuration: `default_config()` to edit, `parse_config()` to check. Imports no JAX."""

from distill.config.parse import default_config, parse_config

__all__ = ["default_config", "parse_config"]
