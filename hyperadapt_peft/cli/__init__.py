"""The command line: each command is a module of its name; what they share lies beside them."""
