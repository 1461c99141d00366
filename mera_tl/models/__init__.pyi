from .chat import Turn as Turn
from .families import lay_out_for_decoding as lay_out_for_decoding
from .families import layout as layout
from .families import load_folder as load_folder
from .model import Model as Model
from .model import load_model as load_model
from .model import model_names as model_names
from .model import resid_post as resid_post
