"""What a user sees instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend; the message says what was found, what was expected and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """The TOML file or an NMOE_* override is wrong."""


class DataError(UserError):
    """A dataset, tokenizer or token shard is missing, damaged or does not fit the config."""


class CheckpointError(UserError):
    """No checkpoint can be loaded, or it does not fit the config."""
