from .options import WorkerOptions as WorkerOptions
from .runner import RayRunner as RayRunner
