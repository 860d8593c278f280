from .options import WorkerOptions as WorkerOptions
from .ranks import Torchrun as Torchrun
from .runner import RayRunner as RayRunner
