"""The command ``bigopt``: one module per subcommand; ``__main__`` parses the command line."""
