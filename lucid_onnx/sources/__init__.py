"""Tables and modules from elsewhere: a module for each framework, and one for each file format."""
