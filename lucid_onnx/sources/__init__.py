"""Tables and modules from elsewhere: a module for each framework, and one for each file format.

`import_model` makes a model of a file or folder of another library, `TextEncoder` of the module `encoder` runs it.
"""

from .formats import import_model
from .imported import Format, Imported, Layout, Options, TableDtype

__all__ = ["Format", "Imported", "Layout", "Options", "TableDtype", "import_model"]
