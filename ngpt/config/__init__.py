"""Settings as frozen, strict types; YAML with source positions; overrides by dotted name; secrets."""
