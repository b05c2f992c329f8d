"""What is done with adapters that exist: load many, swap, convert, inspect."""
