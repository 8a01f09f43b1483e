"""The command line `noria`. Nothing heavy is imported before a command needs it: `--help` must be quick."""
