"""The body of each command: parse, load, train, save."""
