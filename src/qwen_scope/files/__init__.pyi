from .lines import append_lines as append_lines
from .lines import read_lines as read_lines
from .lock import lock_folder as lock_folder
from .whole import not_onto_itself as not_onto_itself
from .whole import write_text as write_text
from .whole import write_whole as write_whole
