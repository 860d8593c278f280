from .bootstrap import Interval as Interval
from .bootstrap import bootstrap as bootstrap
from .bootstrap import difference as difference
from .discovery import auroc as auroc
from .discovery import benjamini_hochberg as benjamini_hochberg
from .discovery import rank_test as rank_test
