from .model import HookPoint as HookPoint
from .sae import FeatureActs as FeatureActs
from .sae import catalog as catalog
from .sae import load_sae as load_sae
from .sae import save_sae as save_sae
from .scope import Scope as Scope
from .scope import load_scope as load_scope
from .steer import Intervention as Intervention
from .store import FeatureStore as FeatureStore

__version__: str
