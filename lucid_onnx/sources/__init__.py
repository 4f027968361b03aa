"""Where tables and modules come from: a module for each framework, and one for each file format."""
