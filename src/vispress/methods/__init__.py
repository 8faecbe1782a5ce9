"""The built-in methods; importing this package registers them. One import line a method."""
