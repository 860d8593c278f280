from .bootstrap import Interval as Interval
from .bootstrap import bootstrap as bootstrap
from .bootstrap import difference as difference
