"""Typed configuration: dataclass defaults, YAML files, `key.sub=value` overrides."""
