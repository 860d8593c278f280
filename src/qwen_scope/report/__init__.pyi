from .table import size as size
from .table import table as table
from .tokens import legend as legend
from .tokens import shaded as shaded
from .tokens import visible as visible
