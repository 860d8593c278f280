from .access.gate import check_host as check_host
from .access.limits import Limits as Limits
from .api import Api as Api
from .app_state import AppState as AppState
from .page import build as build
from .page import launch as launch
