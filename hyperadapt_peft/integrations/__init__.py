"""All that touches other packages' classes."""
