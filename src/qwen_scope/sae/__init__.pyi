from . import catalog as catalog
from .acts import FeatureActs as FeatureActs
from .agreement import Agreement as Agreement
from .agreement import compare_saes as compare_saes
from .base import SAE as SAE
from .base import Identity as Identity
from .base import fingerprint as fingerprint
from .catalog import Group as Group
from .exact import in_float64 as in_float64
from .feature_name import feature_name as feature_name
from .feature_name import features_at as features_at
from .feature_name import numbers_in as numbers_in
from .feature_name import parse_feature as parse_feature
from .feature_name import parse_features as parse_features
from .formats import LAYOUTS as LAYOUTS
from .jumprelu import JumpReLU as JumpReLU
from .kinds import KINDS as KINDS
from .load import layers_of as layers_of
from .load import load_sae as load_sae
from .push import push_saes as push_saes
from .save import folder_name as folder_name
from .save import save_sae as save_sae
<<<<<<< HEAD
from .slices import SliceOfSAE as SliceOfSAE
from .slices import join_group as join_group
from .slices import leave_group as leave_group
from .slices import slice_sae as slice_sae
=======
from .terms import tell_terms as tell_terms
>>>>>>> 7beece1 (SAEs, stores and recipes go to the Hub with a card that says what they are and whose terms they carry; Qwen's terms are noted wherever its SAEs are loaded; the README begins with what two commands print, which is tested)
from .terms import terms_of as terms_of
from .topk import TopK as TopK
